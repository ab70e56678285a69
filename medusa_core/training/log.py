"""The log of a training run: CSV files that grow with it, and their picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medusa_core.training.plan import Progress

_LOSS_FILE, _ACCURACY_FILE = "training.csv", "accuracy.csv"
_PLOT_FILE = "training.png"
_DPI = 150


class TrainingLog:
    """A context manager. What was logged of updates that a resumed run makes again is dropped."""

    def __init__(self, folder: Path, num_updates_done: int) -> None:
        self._files = ExitStack()
        self._losses = self._table(folder / _LOSS_FILE, [field.name for field in fields(Progress)], num_updates_done)
        self._accuracies = self._table(folder / _ACCURACY_FILE, ["update", "head", "top1", "top10"], num_updates_done)

    def write(self, progress: Progress) -> None:
        self._losses.write(asdict(progress))

    def write_accuracies(self, update: int, accuracies: Sequence[tuple[float, float]]) -> None:
        """(top-1, top-10) of each head on rows that are not learned from."""
        for head, (top1, top10) in enumerate(accuracies, start=1):
            self._accuracies.write({"update": update, "head": head, "top1": top1, "top10": top10})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()

    def _table(self, path: Path, columns: Sequence[str], num_updates_done: int) -> _Table:
        table = _Table(path, columns, num_updates_done)
        self._files.callback(table.close)
        return table

    @staticmethod
    def plot(folder: Path) -> Path:
        """Draw loss and learning rate over updates, and the heads' accuracy."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.0, 4.2), layout="constrained")
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        rows = _read(folder / _LOSS_FILE)
        updates = [int(row["update"]) for row in rows]
        loss_axes.plot(updates, [float(row["loss"]) for row in rows], label="loss")
        loss_axes.set_xlabel("update")
        loss_axes.set_ylabel("loss, all heads")
        loss_axes.grid(visible=True, alpha=0.3)
        rates = loss_axes.twinx()
        rates.plot(updates, [float(row["learning_rate"]) for row in rows], color="C1", alpha=0.6, label="learning rate")
        rates.set_ylabel("learning rate")
        measured = _read(folder / _ACCURACY_FILE)
        for head in sorted({int(row["head"]) for row in measured}):
            points = [(int(row["update"]), float(row["top1"])) for row in measured if int(row["head"]) == head]
            accuracy_axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"head {head}")
        accuracy_axes.set_xlabel("update")
        accuracy_axes.set_ylabel("top-1 accuracy on rows kept back")
        accuracy_axes.grid(visible=True, alpha=0.3)
        if measured:
            accuracy_axes.legend()
        path = folder / _PLOT_FILE
        figure.savefig(path, dpi=_DPI)
        return path


class _Table:
    """A CSV file with a column `update`, of which rows up to `num_updates_done` are kept."""

    def __init__(self, path: Path, columns: Sequence[str], num_updates_done: int) -> None:
        # what a crash has cut short is dropped
        rows = [row for row in _read(path) if None not in row.values() and row["update"].isdecimal()]
        kept = [row for row in rows if int(row["update"]) <= num_updates_done]
        partial = path.with_suffix(".partial")
        self._file = partial.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()
        partial.replace(path)

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
