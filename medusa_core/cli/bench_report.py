"""The report of a benchmark while it runs: written again after each piece of work, whatever ends it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer

from medusa_core.bench.machine import command_line, describe_machine
from medusa_core.bench.report import Figures, Report, write_report
from medusa_core.outputs import EngineInfo


class KeptReport:
    """What was measured so far, in its folder. engine: set it once there is one."""

    def __init__(self, kind: str, folder: Path, settings: dict[str, Any], notes: list[str]) -> None:
        self.engine: EngineInfo | None = None
        self.report: Report | None = None
        self.folder = folder
        self._kind = kind
        self._settings = settings
        self._notes = notes
        self._machine = describe_machine()

    def keep(self, figures: Figures, missing: str | None) -> None:
        """Replace the files, plots left out. missing: as `Report.incomplete`."""
        report = Report(
            kind=self._kind,
            machine=self._machine,
            command=command_line(),
            settings=self._settings,
            figures=figures,
            engine=self.engine,
            notes=self._notes,
            incomplete=missing,
        )
        write_report(report, self.folder, has_plots=False)
        self.report = report


@contextmanager
def kept_report(context: typer.Context, kind: str, notes: list[str]) -> Iterator[KeptReport]:
    """Around all that takes long. At its end, and when interrupted, the plots are drawn and the report is printed.

    Ctrl-C ends the program with code 130, SIGTERM with 143. The folder of `--output` must exist.
    """
    kept = KeptReport(kind, Path(context.params["output"]), settings(context), notes)
    has_plots = not context.params["no_plots"]
    handler = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield kept
        _finish(kept, has_plots)
    except KeyboardInterrupt as interrupt:
        # The plots take seconds; who asks again must not lose the report for that.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _finish(kept, has_plots)
        print(f"medusa: interrupted; {_whereabouts(kept)}.", file=sys.stderr)
        sys.exit(143 if isinstance(interrupt, _Terminated) else 130)
    except Exception:
        if kept.report is not None:
            print(f"medusa: failed; {_whereabouts(kept)}.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def settings(context: typer.Context) -> dict[str, Any]:
    """Every option, given or not, but the key."""
    params = context.params.items()
    return {name: str(value) if isinstance(value, Path) else value for name, value in params if name != "api_key"}


def _finish(kept: KeptReport, has_plots: bool) -> None:
    if kept.report is not None:
        print(write_report(kept.report, kept.folder, has_plots=has_plots))


def _whereabouts(kept: KeptReport) -> str:
    if kept.report is None:
        return "nothing was measured yet"
    state = f"incomplete: {kept.report.incomplete}; " if kept.report.incomplete else ""
    return f"{state}the report is in {kept.folder}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM. A KeyboardInterrupt, since event loops and libraries let those through."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
