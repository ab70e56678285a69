"""Draws the dashboards from what a Prometheus has, panel by panel in Grafana's places.

    python -m deploy.grafana.plot --url http://127.0.0.1:9090 --end 1790000000 --minutes 3 --output docs/figures

Needs matplotlib, as the extra `bench` does.
"""

from __future__ import annotations

import argparse
import re
import time
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.grafana.generate import FOLDER
from deploy.grafana.panel_data import Line, PanelSource, Prometheus, Target, all_of, expand

NUM_COLUMNS = 24
WIDTH_INCHES, ROW_INCHES = 15.0, 0.3
DPI = 100
# Inches around the axes of a panel, for ticks above and below, left and right.
MARGINS = (0.36, 0.3, 0.46, 0.14)
SCRAPE_INTERVAL_S = 5
RATE_INTERVAL_S = 4 * SCRAPE_INTERVAL_S
UNITS = {"s": "s", "reqps": "requests/s", "ops": "1/s", "percentunit": "%", "suffix: tok/s": "tokens/s", "suffix:x": "x"}
# Lines of a legend that fit into a panel.
MAX_LEGEND = 8


class Window:
    """The time that a picture shows, and the data of that time."""

    def __init__(self, prometheus: Prometheus, *, end_s: float, minutes: float) -> None:
        self._prometheus = prometheus
        self.start_s, self.end_s = end_s - 60 * minutes, end_s

    def lines(self, target: Target) -> list[tuple[str, Line]]:
        """Series with the names that the legend gives them, position 2 before position 10. Those that are always 0 are left out, if
        others are not."""
        expr = expand(target.expr, rate_interval_s=RATE_INTERVAL_S, range_s=self.end_s - self.start_s)
        if target.is_instant:
            found = self._prometheus.at(expr, time_s=self.end_s)
        else:
            found = self._prometheus.over(expr, start_s=self.start_s, end_s=self.end_s, step_s=SCRAPE_INTERVAL_S)
        named = [(line.name(target.legend), line) for line in found if line.points]
        if not target.is_heatmap:
            named = [(name, line) for name, line in named if any(value for _, value in line.points)] or named
        return sorted(named, key=lambda pair: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", pair[0])])

    def minutes(self, line: Line) -> list[float]:
        return [(time_s - self.start_s) / 60 for time_s, _ in line.points]


def draw(dashboard: Path, window: Window) -> Figure:
    """One dashboard."""
    panels = all_of(dashboard)
    num_rows = max(y + height for _, y, _, height in (panel.place for panel in panels))
    figure = Figure(figsize=(WIDTH_INCHES, num_rows * ROW_INCHES), dpi=DPI, facecolor="white")
    for panel in panels:
        _draw_panel(figure, panel, window, num_rows)
    return figure


def _draw_panel(figure: Figure, panel: PanelSource, window: Window, num_rows: int) -> None:
    x, y, width, height = panel.place
    column, total = WIDTH_INCHES / NUM_COLUMNS, num_rows * ROW_INCHES
    left, top = x * column, y * ROW_INCHES
    if panel.kind == "row":
        figure.text((left + 0.1) / WIDTH_INCHES, 1 - (top + 0.2) / total, panel.title, fontsize=12, weight="bold", va="center")
        return
    above, below, before, after = MARGINS
    area = (
        (left + before) / WIDTH_INCHES,
        1 - (top + height * ROW_INCHES - below) / total,
        (width * column - before - after) / WIDTH_INCHES,
        (height * ROW_INCHES - above - below) / total,
    )
    axes = figure.add_axes(area)
    unit = UNITS.get(panel.unit, "")
    axes.set_title(f"{panel.title}, {unit}" if unit else panel.title, fontsize=9, loc="left", pad=4)
    axes.tick_params(labelsize=7, length=2, colors="#555555")
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
    if not any(window.lines(target) for target in panel.targets):
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="#999999", fontsize=9)
        return
    {"stat": _stat, "timeseries": _series, "heatmap": _heatmap, "bargauge": _bars, "table": _table}[panel.kind](axes, panel, window)


def _stat(axes: Axes, panel: PanelSource, window: Window) -> None:
    """The latest number, on its recent past."""
    ((_, line),) = window.lines(panel.targets[0])
    values = _scaled(panel, line)
    axes.fill_between(window.minutes(line), values, color="#2a7fb8", alpha=0.15, linewidth=0)
    axes.set_ylim(0, 2.2 * max(values) or 1)
    axes.text(0.5, 0.62, f"{values[-1]:.3g}", transform=axes.transAxes, ha="center", va="center", fontsize=15, color="#1f5f8b")
    axes.set_xticks([])
    axes.set_yticks([])


def _series(axes: Axes, panel: PanelSource, window: Window) -> None:
    found = [named for target in panel.targets for named in window.lines(target)]
    if panel.is_stacked:
        times = sorted({minute for _, line in found for minute in window.minutes(line)})
        known = [dict(zip(window.minutes(line), _scaled(panel, line), strict=True)) for _, line in found]
        rows = [[values.get(minute, 0.0) for minute in times] for values in known]
        axes.stackplot(times, rows, labels=[name for name, _ in found], alpha=0.75, linewidth=0)
    else:
        for name, line in found:
            # a gap where there was nothing to tell
            axes.plot(
                *_with_gaps(window.minutes(line), _scaled(panel, line)), label=name, linewidth=1.1, marker=".", markersize=1.5
            )
    if panel.line_at is not None:
        axes.axhline(panel.line_at, color="black", linestyle="--", linewidth=0.8)
    # Room for the legend above the lines.
    top = axes.get_ylim()[1] * (1 + 0.08 * min(len(found), MAX_LEGEND) * (len(found) > 1))
    axes.set_ylim(0, 105 if panel.is_share else top)
    _minutes_axis(axes, window)
    if len(found) > 1:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[:MAX_LEGEND],
            labels[:MAX_LEGEND],
            fontsize=6.5,
            loc="upper left",
            frameon=True,
            framealpha=0.7,
            edgecolor="none",
            borderpad=0.2,
            labelspacing=0.2,
            handlelength=1.2,
        )


def _with_gaps(minutes: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """NaN between points that lie apart."""
    spaced: list[tuple[float, float]] = list(zip(minutes[:1], values[:1], strict=True))
    for (before, _), (minute, value) in pairwise(zip(minutes, values, strict=True)):
        if minute - before > 1.5 * SCRAPE_INTERVAL_S / 60:
            spaced.append((before, float("nan")))
        spaced.append((minute, value))
    return [minute for minute, _ in spaced], [value for _, value in spaced]


def _heatmap(axes: Axes, panel: PanelSource, window: Window) -> None:
    """Buckets over time, those that were ever filled."""
    bounds, lines = _by_bound(window.lines(panel.targets[0]))
    times = sorted({minute for line in lines for minute in window.minutes(line)})
    at = [dict(zip(window.minutes(line), (value for _, value in line.points), strict=True)) for line in lines]
    cumulative = [[values.get(minute, 0.0) for minute in times] for values in at]
    cells = [[max(b - a, 0.0) for a, b in zip(low, high, strict=True)] for low, high in pairwise([[0.0] * len(times), *cumulative])]
    used = [idx for idx, row in enumerate(cells) if any(row)]
    shown = range(used[0], used[-1] + 1) if used else range(1)
    axes.pcolormesh(times, range(len(shown)), [cells[idx] for idx in shown], cmap="Oranges", shading="nearest")
    step = max(1, len(shown) // 8)
    axes.set_yticks(range(0, len(shown), step), [bounds[idx] for idx in shown][::step])
    _minutes_axis(axes, window)


def _bars(axes: Axes, panel: PanelSource, window: Window) -> None:
    target = panel.targets[0]
    found = window.lines(target)
    if target.is_heatmap:
        names, lines = _by_bound(found)
        totals = [line.points[-1][1] for line in lines]
        values = [high - low for low, high in pairwise([0.0, *totals])]
        last = max((idx for idx, value in enumerate(values) if value > 0.5), default=0)
        names, values = names[: last + 1], values[: last + 1]
    else:
        names, values = [name for name, _ in found], [line.points[-1][1] for _, line in found]
    axes.barh(names, values, color="#2a7fb8", alpha=0.8)
    axes.invert_yaxis()


def _table(axes: Axes, panel: PanelSource, window: Window) -> None:
    """Labels as text."""
    hidden = {"__name__", "job", "instance"}
    for _, line in window.lines(panel.targets[0]):
        pairs = [f"{name} {value}" for name, value in sorted(line.labels.items()) if name not in hidden]
        per_line = 6
        text = "\n".join("     ".join(pairs[idx : idx + per_line]) for idx in range(0, len(pairs), per_line))
        axes.text(0.0, 0.9, text, transform=axes.transAxes, fontsize=8, va="top", linespacing=1.8)
    axes.set_axis_off()


def _by_bound(found: list[tuple[str, Line]]) -> tuple[list[str], list[Line]]:
    """Upper ends of a histogram's buckets, as people write them, and the cumulative series, both in order."""
    ordered = sorted((line for _, line in found), key=lambda line: float(line.labels["le"]))
    return [f"{float(line.labels['le']):g}" for line in ordered], ordered


def _scaled(panel: PanelSource, line: Line) -> list[float]:
    factor = 100 if panel.unit == "percentunit" else 1
    return [factor * value for _, value in line.points]


def _minutes_axis(axes: Axes, window: Window) -> None:
    axes.set_xlim(0, (window.end_s - window.start_s) / 60)
    axes.xaxis.set_major_formatter("{x:g} min")
    axes.locator_params(axis="x", nbins=4)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)


def main() -> None:
    """A PNG for each dashboard."""
    parser = argparse.ArgumentParser(description="Draw the dashboards from what a Prometheus has.")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus")
    parser.add_argument("--end", type=float, default=time.time(), help="UNIX seconds at which the pictures end (default: now)")
    parser.add_argument("--minutes", type=float, default=15, help="how long the pictures go back")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    options = parser.parse_args()
    window = Window(Prometheus(options.url), end_s=options.end, minutes=options.minutes)
    for dashboard in sorted(FOLDER.glob("*.json")):
        name = dashboard.stem.replace("medusa-", "dashboard-")
        draw(dashboard, window).savefig(options.output / f"{name}.png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
