"""Measured accuracies of heads, kept in a small JSON file beside them.

Format::

    {"format": 1, "rank_accuracy": [[...C floats] per head], "num_tokens": 4096, "source": "what was measured, on which prompts"}

`rank_accuracy[k][r]` is the share of positions at which the (r+1)-th best guess of head k is the token that greedy decoding emits;
the ranks of a head add up to its top-C accuracy. Trees are built from these numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from medusa_core.errors import ModelLoadError

_FORMAT = 1
_FOLDER_FILE = "medusa_calibration.json"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """rank_accuracy: [K][C], see the module's docstring. num_tokens: positions measured."""

    rank_accuracy: tuple[tuple[float, ...], ...]
    num_tokens: int
    source: str


def find_calibration(heads: Path) -> Path | None:
    """The calibration beside a heads file (`<stem>.calibration.json`) or in the folder of heads (`medusa_calibration.json`)."""
    folder = heads if heads.is_dir() else heads.parent
    candidates = [folder / _FOLDER_FILE]
    if heads.is_file():
        candidates.insert(0, heads.with_suffix(".calibration.json"))
    return next((path for path in candidates if path.is_file()), None)


def load_calibration(path: Path) -> Calibration:
    """Read a calibration file. Raises ModelLoadError for one that is malformed or of another format."""
    try:
        data = json.loads(path.read_text())
        ranks = tuple(tuple(float(share) for share in head) for head in data["rank_accuracy"])
        calibration = Calibration(rank_accuracy=ranks, num_tokens=int(data["num_tokens"]), source=str(data["source"]))
        is_known_format = data["format"] == _FORMAT
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(f"{path} is no calibration file ({error!r}).", hint="Delete it, or measure again.") from error
    is_valid = all(head and all(0.0 <= share <= 1.0 for share in head) and sum(head) <= 1.0 + 1e-6 for head in ranks)
    if not is_known_format or not ranks or not is_valid:
        hint = "Each head needs shares between 0 and 1 that add up to at most 1. Delete it, or measure again."
        raise ModelLoadError(f"{path} is no calibration of format {_FORMAT}.", hint=hint)
    return calibration
