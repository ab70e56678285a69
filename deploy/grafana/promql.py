"""PromQL of the panels in variables of the dashboards (`$model_name`, `$instance`) and Grafana (`$__rate_interval`, `$__range`)."""

from __future__ import annotations

ENGINE = 'model_name=~"$model_name",instance=~"$instance"'
# Answers of HTTP and refusals know no model.
SERVER = 'instance=~"$instance"'
# Probes and scrapes are not what clients see.
API = f'{SERVER},route=~"/v1/.+"'


def gauge(name: str, *, of: str = ENGINE, function: str = "sum", by: str = "") -> str:
    """A gauge over the servers chosen. `by`: labels to keep, with commas."""
    return f"{function}{_by(by)}(medusa_{name}{{{of}}})"


def rate(name: str, *, of: str = ENGINE, by: str = "") -> str:
    """Growth per second of a counter, summed over the servers chosen."""
    return f"sum{_by(by)}(rate(medusa_{name}{{{of}}}[$__rate_interval]))"


def increase(name: str, *, by: str = "", window: str = "$__range") -> str:
    """Growth of a counter over `window`: of the range that the dashboard shows, unless said otherwise."""
    return f"sum{_by(by)}(increase(medusa_{name}{{{ENGINE}}}[{window}]))"


def ratio(part: str, whole: str) -> str:
    """A share that has no value, rather than NaN, while nothing happens."""
    return f"{part} / ({whole} > 0)"


def ratio_by(part: str, whole: str) -> str:
    """As `ratio`, of parts that carry a label which the whole has not."""
    return f"{part} / on () group_left () ({whole} > 0)"


def mean(name: str) -> str:
    """Mean of a histogram's observations."""
    return ratio(rate(f"{name}_sum"), rate(f"{name}_count"))


def quantile(share: float, name: str, *, of: str = ENGINE, by: str = "") -> str:
    """The value below which `share` of a histogram's observations lie."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {rate(f'{name}_bucket', of=of, by=labels)})"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
