"""Trees in the form in which masks are made: cut into chains, which a matcher follows from the root.

Shapes: B lanes · N tree nodes (root included) · K rows of masks · W words of 32 tokens, int32: token t is bit t % 32 of word
t // 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class TreeMasks:
    """Masks of the nodes of several lanes' trees.

    mask_KW: rows, of which some belong to no node. row_BN: the row of each node, int64; -1 where it has none, and then it must not
    be descended to.
    """

    mask_KW: np.ndarray
    row_BN: np.ndarray


@dataclass(frozen=True, slots=True)
class Chain:
    """nodes: each the child of the one before. path: what leads from the root to the last of them, root excluded.

    first_depth: of the nodes, the root's being 0. first_row: among its lane's, of the mask at the root. Those along the path
    follow: the nodes' own come last.
    """

    nodes: tuple[int, ...]
    path: tuple[int, ...]
    first_depth: int
    first_row: int


@lru_cache(maxsize=64)
def chains_of(parents: tuple[int, ...]) -> list[Chain]:
    """A tree cut into chains, each as long as it gets, the one from the root first and none before the node that it hangs on.

    parents: of each node, before it in order; the root's is -1.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    chains = []
    first_row = 0
    starts: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    while starts:
        node, above = starts.pop(0)
        nodes: list[int] = [node]
        while children[nodes[-1]]:
            nodes.append(children[nodes[-1]][0])
        path = (*above, *nodes) if node > 0 else tuple(nodes[1:])
        chains.append(Chain(tuple(nodes), path, len(path) - len(nodes) + 1, first_row))
        first_row += len(path) + 1
        for depth, at in enumerate(nodes):
            to = (*above, *nodes[: depth + 1]) if node > 0 else tuple(nodes[1 : depth + 1])
            starts += [(sibling, to) for sibling in children[at][1:]]
    return chains


def num_mask_rows(parents: tuple[int, ...]) -> int:
    """Rows that the masks of one lane's tree take: chains repeat what leads to them."""
    return sum(len(chain.path) + 1 for chain in chains_of(parents))
