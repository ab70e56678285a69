"""The log of a training run: a CSV file that grows with each update, and its picture."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from medusa_core.training.trainer import Progress

_LOG_FILE = "training.csv"
_PLOT_FILE = "training.png"
_COLUMNS = tuple(field.name for field in fields(Progress))
_DPI = 150


class TrainingLog:
    """A context manager. What was logged of updates that a resumed run makes again is dropped."""

    def __init__(self, folder: Path, num_updates_done: int) -> None:
        path = folder / _LOG_FILE
        kept = [row for row in _read(path) if int(row["update"]) <= num_updates_done]
        partial = path.with_suffix(".partial")
        self._file = partial.open("w", newline="")
        self._writer = csv.DictWriter(self._file, _COLUMNS)
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()
        partial.replace(path)

    def write(self, progress: Progress) -> None:
        self._writer.writerow(asdict(progress))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @staticmethod
    def plot(folder: Path) -> Path:
        """Draw loss and learning rate over updates."""
        from matplotlib.figure import Figure

        rows = _read(folder / _LOG_FILE)
        updates = [int(row["update"]) for row in rows]
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(updates, [float(row["loss"]) for row in rows], label="loss")
        axes.set_xlabel("update")
        axes.set_ylabel("loss, all heads")
        axes.grid(visible=True, alpha=0.3)
        rates = axes.twinx()
        rates.plot(updates, [float(row["learning_rate"]) for row in rows], color="C1", alpha=0.6, label="learning rate")
        rates.set_ylabel("learning rate")
        path = folder / _PLOT_FILE
        figure.savefig(path, dpi=_DPI)
        return path


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
