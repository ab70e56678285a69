"""A picture of a tree: every node at its depth, as large as it is often accepted. matplotlib is imported where it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from medusa_core.tree.topology import TreeTopology

_DPI = 150
_LARGEST_NODE = 420.0  # area in points
_SMALLEST_NODE = 14.0
_MIN_LABELLED = 0.02


def plot_tree(tree: TreeTopology, node_acceptance: Sequence[float], title: str, path: Path) -> None:
    """Write a PNG. node_acceptance: of each draft node; the root is always there."""
    from matplotlib.figure import Figure

    acceptance = (1.0, *node_acceptance)
    x_of = _columns(tree)
    figure = Figure(figsize=(min(4.0 + 0.25 * len(set(x_of)), 16.0), 1.6 + 1.2 * (tree.max_depth + 1)), layout="constrained")
    axes = figure.subplots()
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            axes.plot(
                (x_of[parent], x_of[node]), (-tree.depths[parent], -tree.depths[node]), color="0.75", zorder=1,
                linewidth=0.5 + 3.0 * math.sqrt(acceptance[node]),
            )  # fmt: skip
    sizes = [max(_LARGEST_NODE * share, _SMALLEST_NODE) for share in acceptance]
    colors = [f"C{rank % 10}" if rank >= 0 else "black" for rank in tree.ranks]
    axes.scatter(x_of, [-depth for depth in tree.depths], s=sizes, c=colors, zorder=2)
    for node, share in enumerate(acceptance):
        if node and share >= _MIN_LABELLED:
            place = (x_of[node], -tree.depths[node])
            axes.annotate(f"{share:.2f}", place, (0, -17), textcoords="offset points", ha="center", size=7)
    levels = range(tree.max_depth + 1)
    axes.set_yticks([-depth for depth in levels], ["root" if depth == 0 else f"head {depth}" for depth in levels])
    axes.set_xticks([])
    axes.set_ylim(-tree.max_depth - 0.6, 0.5)
    axes.set_title(title, size=9)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=_DPI)


def _columns(tree: TreeTopology) -> list[float]:
    """Leaves side by side in the order of a walk, likelier branches first; every other node above the middle of its children."""
    x_of = [0.0] * tree.num_nodes
    num_leaves = 0

    def place(node: int) -> None:
        nonlocal num_leaves
        children = tree.children[node]
        for child in children:
            place(child)
        if children:
            x_of[node] = (x_of[children[0]] + x_of[children[-1]]) / 2
        else:
            x_of[node] = float(num_leaves)
            num_leaves += 1

    place(0)
    return x_of
