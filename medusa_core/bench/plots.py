"""PNG plots. matplotlib is an optional dependency, so it is imported where it is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_core.bench.figures import RunFigures
from medusa_core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from medusa_core.bench.latency import StepPoint

_SIZE_INCHES = (7.0, 4.2)
_DPI = 150


def require_matplotlib() -> None:
    """Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "The plots need matplotlib.", hint='Install the extra: pip install ".[bench]" in a checkout of medusa-server.'
        )


def throughput(runs: Sequence[RunFigures], path: Path) -> bool:
    """Tokens per second by load, one line per variant. False, and no file, where nothing was measured by load."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        if run.concurrency is not None:
            lines.setdefault(run.variant, []).append((run.concurrency, run.tokens_per_s))
    if not lines:
        return False
    from matplotlib.ticker import LogFormatter

    with _axes(path, "requests at once", "tokens/s", has_legend=True) as axes:
        for variant, points in lines.items():
            loads, speeds = zip(*sorted(points), strict=True)
            axes.plot(loads, speeds, marker="o", label=variant)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        ticks = sorted({load for points in lines.values() for load, _ in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    return True


def inter_token_latency(runs: Sequence[RunFigures], path: Path) -> bool:
    """Share of deliveries by the time since the one before, one line per run."""
    if not any(run.itl_quantiles_s for run in runs):
        return False
    with _axes(path, "time between deliveries, ms", "share", has_legend=True) as axes:
        for run in runs:
            values = run.itl_quantiles_s
            if values:
                load = f"{run.concurrency} at once" if run.concurrency is not None else f"{run.request_rate:g} requests/s"
                # A logarithmic scale has no place for deliveries in the same microsecond.
                milliseconds = [max(1e3 * value, 1e-3) for value in values]
                axes.plot(milliseconds, [n / (len(values) - 1) for n in range(len(values))], label=f"{run.variant}, {load}")
        axes.set_xscale("log")
    return True


def acceptance_by_category(runs: Sequence[RunFigures], path: Path) -> bool:
    """Bars of the first run that offered trees."""
    run = next((run for run in runs if run.acceptance_length is not None), None)
    if run is None:
        return False
    bars = [(c.category, c.acceptance_length) for c in run.categories if c.acceptance_length is not None]
    bars.sort(key=lambda bar: bar[1])
    with _axes(path, f"tokens per tree step ({run.variant}, {run.concurrency} at once)", "") as axes:
        axes.barh([name for name, _ in bars], [length for _, length in bars])
        axes.axvline(run.acceptance_length or 0.0, color="black", linestyle="--", linewidth=1)
    return True


def step_times(points: Sequence[StepPoint], path: Path) -> bool:
    """Milliseconds of a greedy step by nodes, one line per number of lanes."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        if point.step_s is not None and point.sampling == "greedy":
            lines.setdefault(point.num_lanes, []).append((point.num_nodes, 1e3 * point.step_s))
    if not lines:
        return False
    with _axes(path, "nodes per lane", "step, ms", has_legend=True) as axes:
        for num_lanes, line in lines.items():
            nodes, milliseconds = zip(*sorted(line), strict=True)
            axes.plot(nodes, milliseconds, marker="o", label=f"{num_lanes} lanes")
        axes.set_xscale("log", base=2)
        ticks = sorted({nodes for line in lines.values() for nodes, _ in line})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(bottom=0)
    return True


@contextmanager
def _axes(path: Path, x_label: str, y_label: str, *, has_legend: bool = False) -> Iterator[Axes]:
    """A plot that is written to `path` at the end. No display is needed and no global state of pyplot is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if has_legend:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
