"""What the panels' queries give at a Prometheus: for pictures of the dashboards, and for the test that none is empty."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 30


@dataclass(frozen=True)
class Target:
    """One query of a panel, with the dashboards' variables still in it."""

    expr: str
    legend: str
    is_heatmap: bool
    is_instant: bool


@dataclass(frozen=True)
class PanelSource:
    """What a panel shows, read from the dashboard's JSON. place: x, y, width, height in Grafana's grid of 24 columns."""

    kind: str
    place: tuple[int, int, int, int]
    title: str
    unit: str
    is_stacked: bool
    is_share: bool
    line_at: float | None
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Line:
    """One time series: UNIX seconds and values. NaN and infinities are left out."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]

    def name(self, legend: str) -> str:
        """The legend with labels filled in, as Grafana does it."""
        return re.sub(r"{{\s*(\w+)\s*}}", lambda match: self.labels.get(match[1], ""), legend)


def panels_of(dashboard: Path) -> list[PanelSource]:
    """All panels of a dashboard's file, in order, but the rows' titles."""
    return [panel for panel in all_of(dashboard) if panel.kind != "row"]


def all_of(dashboard: Path) -> list[PanelSource]:
    """All panels of a dashboard's file, in order. Titles of rows are panels of the kind "row", without targets."""
    return [_panel(panel) for panel in json.loads(dashboard.read_text())["panels"]]


def _panel(panel: dict[str, Any]) -> PanelSource:
    defaults = panel.get("fieldConfig", {}).get("defaults", {})
    custom = defaults.get("custom", {})
    unit = defaults.get("unit") or panel.get("options", {}).get("yAxis", {}).get("unit", "")
    targets = tuple(
        Target(
            expr=target["expr"],
            legend=target.get("legendFormat", ""),
            is_heatmap=target.get("format") == "heatmap",
            is_instant=target.get("instant", False),
        )
        for target in panel.get("targets", ())
    )
    is_line_drawn = "thresholdsStyle" in custom
    return PanelSource(
        kind=panel["type"],
        place=tuple(panel["gridPos"][key] for key in "xywh"),
        title=panel["title"],
        unit=unit,
        is_stacked=custom.get("stacking", {}).get("mode") == "normal",
        is_share=defaults.get("max") == 1,
        line_at=defaults["thresholds"]["steps"][-1]["value"] if is_line_drawn else None,
        targets=targets,
    )


def expand(expr: str, *, rate_interval_s: float, range_s: float) -> str:
    """The query that Grafana sends for all models and servers."""
    values = {
        "$model_name": ".*",
        "$instance": ".*",
        "$__rate_interval": f"{rate_interval_s:.0f}s",
        "$__range": f"{range_s:.0f}s",
    }
    for variable, value in values.items():
        expr = expr.replace(variable, value)
    if "$" in expr:
        raise ValueError(f"A variable that Grafana would fill in is unknown here: {expr}")
    return expr


class Prometheus:
    """Queries of a running Prometheus. url: as http://127.0.0.1:9090."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)

    def get(self, path: str, **parameters: str | float) -> Any:
        """The data of an answer of the HTTP API. Raises ValueError with Prometheus' own words when it refuses a query."""
        answer = self._http.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise ValueError(f"{answer['error']} ({parameters})")
        return answer["data"]

    def at(self, expr: str, *, time_s: float) -> list[Line]:
        """The values at one moment."""
        found = self.get("query", query=expr, time=time_s)["result"]
        return [_line(series["metric"], [series["value"]]) for series in found]

    def over(self, expr: str, *, start_s: float, end_s: float, step_s: float) -> list[Line]:
        """The values from `start_s` to `end_s`."""
        found = self.get("query_range", query=expr, start=start_s, end=end_s, step=step_s)["result"]
        return [_line(series["metric"], series["values"]) for series in found]


def _line(labels: dict[str, str], values: list[tuple[float, str]]) -> Line:
    points = ((float(time_s), float(value)) for time_s, value in values)
    return Line(labels, tuple((time_s, value) for time_s, value in points if math.isfinite(value)))
