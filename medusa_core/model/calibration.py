"""Measured accuracies of heads, kept in a small JSON file beside them.

Format::

    {"format": 1, "rank_accuracy": [[...C floats] per head], "num_tokens": 4096, "source": "what was measured, on which prompts",
     "tree": [[0], [1], [0, 0], ...], "node_acceptance": [0.5, 0.2, 0.17, ...],
     "lookup_tree": [[0], [-1], [-1, -1], ...], "lookup_gains": [0.5, 0.3, 0.2, ...]}

`rank_accuracy[k][r]` is the share of positions at which the (r+1)-th best guess of head k is the token that greedy decoding emits;
the ranks of a head add up to its top-C accuracy. `tree` is the best tree for what the heads got right together, best node first,
and `node_acceptance` how often each of its nodes is accepted; without the two, trees are built from the accuracies. `lookup_tree`
is the best tree with prompt lookup beside the heads, whose nodes have ranks of -1, and `lookup_gains` what each of its nodes adds
to the tokens of a step, those between two sizes of steps alike; without the two, as in older files, the chain is put into `tree`
by what is typical.

`medusa calibrate` writes such a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_core.errors import ConfigError, ModelLoadError
from medusa_core.tree.topology import TreeTopology

_FORMAT = 1
# A sum of shares may exceed another share by so much, as each is rounded.
_ROUNDING = 1e-4
_FOLDER_FILE = "medusa_calibration.json"
_FOLDER_HEADS = "medusa_lm_head"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """rank_accuracy: [K][C], see the module's docstring. num_tokens: positions measured. tree, lookup_tree: None if there is none;
    else node_acceptance and lookup_gains have an entry per draft node."""

    rank_accuracy: tuple[tuple[float, ...], ...]
    num_tokens: int
    source: str
    tree: TreeTopology | None = None
    node_acceptance: tuple[float, ...] = ()
    lookup_tree: TreeTopology | None = None
    lookup_gains: tuple[float, ...] = ()


def calibration_path(heads: Path) -> Path:
    """Where the calibration of heads is written: `medusa_calibration.json` in their folder, if that or the file that stands for it
    (`medusa_lm_head.*`) is named; else `<stem>.calibration.json` beside the file."""
    if heads.is_dir():
        return heads / _FOLDER_FILE
    return heads.with_name(_FOLDER_FILE) if heads.stem == _FOLDER_HEADS else heads.with_suffix(".calibration.json")


def find_calibration(heads: Path) -> Path | None:
    """The calibration beside a heads file or in the folder of heads."""
    folder = heads if heads.is_dir() else heads.parent
    return next((path for path in (calibration_path(heads), folder / _FOLDER_FILE) if path.is_file()), None)


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a file that `load_calibration` reads back. Raises ConfigError where that is not possible."""
    data: dict[str, object] = {
        "format": _FORMAT,
        "rank_accuracy": [_rounded(head) for head in calibration.rank_accuracy],
        "num_tokens": calibration.num_tokens,
        "source": calibration.source,
    }
    if calibration.tree is not None:
        data["tree"] = calibration.tree.choices
        data["node_acceptance"] = _rounded(calibration.node_acceptance)
    if calibration.lookup_tree is not None:
        data["lookup_tree"] = calibration.lookup_tree.choices
        data["lookup_gains"] = _rounded(calibration.lookup_gains)
    # a key a line
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    try:
        path.write_text(f"{{\n{lines}\n}}\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.", hint="Name another file with --output.") from error


def load_calibration(path: Path) -> Calibration:
    """Read a calibration file. Raises ModelLoadError for one that is malformed or of another format."""
    try:
        data = json.loads(path.read_text())
        ranks = tuple(tuple(float(share) for share in head) for head in data["rank_accuracy"])
        calibration = Calibration(
            rank_accuracy=ranks,
            num_tokens=int(data["num_tokens"]),
            source=str(data["source"]),
            tree=_tree(data, "tree", len(ranks)),
            node_acceptance=_shares(data, "node_acceptance") if "tree" in data else (),
            lookup_tree=_tree(data, "lookup_tree", len(ranks)),
            lookup_gains=_shares(data, "lookup_gains") if "lookup_tree" in data else (),
        )
        is_known_format = data["format"] == _FORMAT
    except (OSError, ValueError, TypeError, KeyError, OverflowError, ConfigError) as error:
        raise ModelLoadError(f"{path} is no calibration file ({error!r}).", hint="Delete it, or measure again.") from error
    if not is_known_format or not _is_valid(calibration):
        hint = (
            "Each head needs shares between 0 and 1 that add up to at most 1, and a node's children to at most its own share. "
            "Delete it, or measure again."
        )
        raise ModelLoadError(f"{path} is no calibration of format {_FORMAT}.", hint=hint)
    return calibration


def _tree(data: Mapping[str, Any], name: str, num_heads: int) -> TreeTopology | None:
    return TreeTopology.from_choices(data[name], num_heads=num_heads) if name in data else None


def _shares(data: Mapping[str, Any], name: str) -> tuple[float, ...]:
    return tuple(float(share) for share in data[name])


def _rounded(shares: Sequence[float]) -> list[float]:
    """Five digits, down: a head's shares still add up to at most 1."""
    return [math.floor(share * 1e5) / 1e5 for share in shares]


def _is_valid(calibration: Calibration) -> bool:
    heads, nodes = calibration.rank_accuracy, calibration.node_acceptance
    are_heads_valid = all(head and all(0.0 <= share <= 1.0 for share in head) and sum(head) <= 1.0 + 1e-6 for head in heads)
    parents = calibration.tree.parents[1:] if calibration.tree is not None else ()
    num_lookup_nodes = calibration.lookup_tree.num_nodes - 1 if calibration.lookup_tree is not None else 0
    if len(nodes) != len(parents) or len(calibration.lookup_gains) != num_lookup_nodes:
        return False
    # nodes that heads fill only: a lookup chain would take from nobody's share
    are_gains_valid = all(0.0 <= gain <= 1.0 for gain in calibration.lookup_gains)
    has_own_nodes = calibration.tree is None or calibration.tree.lookup_depth == 0
    # of the root and of the draft nodes, what is left of each for further children
    left = [1.0, *nodes]
    for share, parent in zip(nodes, parents, strict=True):
        left[parent] -= share
    are_nodes_valid = all(share >= 0.0 for share in nodes) and all(share >= -_ROUNDING for share in left)
    is_lookup_valid = are_gains_valid and has_own_nodes
    return bool(heads) and calibration.num_tokens > 0 and are_heads_valid and are_nodes_valid and is_lookup_valid
