"""results.json, report.md and the plots of a benchmark. The JSON holds everything; the others are drawn from the same objects."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from medusa_core.bench import plots, report_tables
from medusa_core.bench.latency import LatencyFigures
from medusa_core.bench.machine import Machine
from medusa_core.bench.server import ServedRun
from medusa_core.bench.throughput import ThroughputFigures
from medusa_core.errors import ConfigError
from medusa_core.outputs import EngineInfo


@dataclass(frozen=True, kw_only=True)
class ServerReport:
    """model: as the server names it."""

    url: str
    model: str
    runs: list[ServedRun]
    offline_variant: str | None = None


Figures = ThroughputFigures | LatencyFigures | ServerReport
_FIGURES: dict[str, type[Figures]] = {"throughput": ThroughputFigures, "latency": LatencyFigures, "server": ServerReport}


@dataclass(frozen=True, kw_only=True)
class Report:
    """One benchmark. kind: throughput, latency or server. settings: every option, as given or by default. notes: what to keep in
    mind when reading the figures. incomplete: how much was done of what was asked for, where the benchmark ended before its end."""

    kind: str
    machine: Machine
    command: str
    settings: dict[str, Any]
    figures: Figures
    engine: EngineInfo | None = None
    notes: list[str] = field(default_factory=list)
    incomplete: str | None = None


def prepare_folder(folder: Path) -> None:
    """Make the folder and write to it. Raises ConfigError; call it before anything runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}.") from error


def write_report(report: Report, folder: Path, *, has_plots: bool) -> str:
    """Write results.json, report.md and, if asked for, PNG files into an existing folder. Returns the text of the report.

    Whoever ends the program meanwhile leaves the old JSON and Markdown or the new, never half of one. Raises ConfigError where they
    cannot be written.
    """
    try:
        _replace(folder / "results.json", msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        text = render(report, _draw(report.figures, folder) if has_plots else [])
        _replace(folder / "report.md", text.encode())
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}.") from error
    return text


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f"{path.name}.part")
    beside.write_bytes(data)
    os.replace(beside, path)


def read_report(folder: Path) -> Report:
    """What `write_report` wrote. Raises ConfigError."""
    path = folder / "results.json"
    try:
        data = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        figures: Figures = msgspec.convert(data.pop("figures"), _FIGURES[data["kind"]])
        return Report(
            **data
            | {
                "figures": figures,
                "machine": msgspec.convert(data["machine"], Machine),
                "engine": msgspec.convert(data["engine"], EngineInfo | None),
            }
        )
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no results of this version of medusa bench ({error}).") from error


def render(report: Report, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown. pictures: file names beside it."""
    sections = [f"# medusa bench {report.kind}"]
    if report.incomplete:
        sections.append(f"**Incomplete: {report.incomplete}.** The rest has not been measured.")
    sections.append(report_tables.conditions(report.machine, report.engine, report.command))
    sections += _tables(report.figures)
    sections += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
    if report.notes:
        sections.append("## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes))
    settings = "\n".join(f"- `{name}`: {value}" for name, value in report.settings.items())
    sections.append(f"## Settings\n\n{settings}")
    return "\n\n".join(section for section in sections if section) + "\n"


def _tables(figures: Figures) -> list[str]:
    if isinstance(figures, ThroughputFigures):
        return report_tables.throughput(figures)
    if isinstance(figures, LatencyFigures):
        return report_tables.latency(figures)
    return report_tables.served(figures.runs, figures.offline_variant)


def _draw(figures: Figures, folder: Path) -> list[str]:
    """Names of the files written; plots without data are left out."""
    drawings: dict[str, Callable[[Path], bool]] = {}
    if isinstance(figures, LatencyFigures):
        drawings["step_time_by_nodes.png"] = lambda path: plots.step_times(figures.steps, path)
    else:
        runs = figures.runs if isinstance(figures, ThroughputFigures) else [run.figures for run in figures.runs]
        drawings["throughput.png"] = lambda path: plots.throughput(runs, path)
        drawings["inter_token_latency.png"] = lambda path: plots.inter_token_latency(runs, path)
        drawings["acceptance_by_category.png"] = lambda path: plots.acceptance_by_category(runs, path)
    return [name for name, draw in drawings.items() if draw(folder / name)]
