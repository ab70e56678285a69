"""Sums of what several front ends have counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric

from server.front_ends.messages import Family, Sample

# What these say is true for ever, so it stays in the sum when a front end has gone; a gauge tells of now.
_CUMULATIVE = frozenset({"counter", "histogram", "summary"})


def families_of(metrics: Iterable[Metric]) -> list[Family]:
    """A registry's metrics as plain data, times of creation left out."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [Sample(s.name, dict(s.labels), s.value) for s in metric.samples if s.name != f"{metric.name}_created"],
        )
        for metric in metrics
    ]


def add_up(live: Iterable[list[Family]], gone: Iterable[list[Family]]) -> list[Family]:
    """Sums by name and labels: of `live` all, of `gone` what only grows."""
    totals: dict[str, tuple[Family, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for families, is_live in ((live, True), (gone, False)):
        for family in (family for part in families for family in part):
            if not is_live and family.type not in _CUMULATIVE:
                continue
            _, values = totals.setdefault(family.name, (family, {}))
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                values[key] = values.get(key, 0.0) + sample.value
    return [
        Family(name, family.documentation, family.type, [Sample(key, dict(labels), v) for (key, labels), v in values.items()])
        for name, (family, values) in totals.items()
    ]


def metrics_of(families: Iterable[Family]) -> Iterator[Metric]:
    """The library's metrics again, to be rendered."""
    for family in families:
        metric = Metric(family.name, family.documentation, family.type)
        for sample in family.samples:
            metric.add_sample(sample.name, sample.labels, sample.value)
        yield metric
