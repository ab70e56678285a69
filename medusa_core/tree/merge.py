"""A lookup chain beside the nodes of heads: which of the two the tree grows by, node for node.

Heads and lookup draft at the same time, and a step takes the longer of what they got right. So a node is worth what it adds to
that, its *gain*, which depends on the nodes before it: a step with the first n nodes emits 1 + the sum of their gains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from medusa_core.tree.topology import LOOKUP, Choice, TreeTopology, is_lookup, lookup_chain

# Longest chain that is offered: a step's room, results and histograms are made for the deepest path. 16 levels with the root.
MAX_LOOKUP_DEPTH = 15
# What lookup is taken for where it was not measured: how often so many tokens are right, in steps that draft nothing else. The mean
# of Spec-Bench's categories, by answers of the demo model.
TYPICAL_LOOKUP: tuple[float, ...] = (
    0.227, 0.151, 0.119, 0.101, 0.090, 0.082, 0.077, 0.071, 0.067, 0.064, 0.062, 0.059, 0.057, 0.055, 0.054,
)  # fmt: skip


def merge_observed(
    tree: TreeTopology, places: Iterable[tuple[Choice, int]], num_nodes: int, *, max_depth: int = MAX_LOOKUP_DEPTH
) -> TreeTopology:
    """The tree of at most `num_nodes` nodes, root included, that grows by what adds most at the places observed.

    The next piece is the one with most gain per node: some nodes of `tree`, whose order stays, or some of the chain. A piece is as
    long as it needs to be, since what comes first may be worth little by itself.

    Args:
        tree: of heads only.
        places: what both get right where steps start, at least one: the ranks of the right tokens in the heads' lists
            (`best_observed_tree`), and the number of tokens that lookup has right.
        max_depth: of the chain.
    """
    paths, lookup_lens = zip(*places, strict=True)
    # shapes: S places
    lookup_S = np.array(lookup_lens)
    head_S = np.zeros(len(paths), dtype=np.int64)
    reached_by = [_reached(choice, paths) for choice in tree.choices]
    choices: list[Choice] = []
    num_heads_nodes = depth = 0
    while num_left := num_nodes - 1 - len(choices):
        now_S = np.maximum(head_S, np.minimum(lookup_S, depth))
        pieces: list[tuple[float, int, bool]] = []
        longer_S = head_S
        for length, reached_S in enumerate(reached_by[num_heads_nodes : num_heads_nodes + num_left], start=1):
            longer_S = np.maximum(longer_S, reached_S)
            pieces.append((float((np.maximum(longer_S, now_S) - now_S).mean()) / length, length, False))
        for length in range(1, min(max_depth - depth, num_left) + 1):
            deeper_S = np.minimum(lookup_S, depth + length)
            pieces.append((float((np.maximum(deeper_S, now_S) - now_S).mean()) / length, length, True))
        if not pieces:
            break
        # the shortest of equally good ones, and heads before the chain
        _, length, is_chain = max(pieces, key=lambda piece: (piece[0], -piece[1]))
        if is_chain:
            choices += [(LOOKUP,) * (depth + number) for number in range(1, length + 1)]
            depth += length
        else:
            choices += tree.choices[num_heads_nodes : num_heads_nodes + length]
            head_S = np.maximum.reduce([head_S, *reached_by[num_heads_nodes : num_heads_nodes + length]])
            num_heads_nodes += length
    return TreeTopology(tuple(choices))


def merge_typical(tree: TreeTopology, acceptance: Sequence[float], num_nodes: int) -> tuple[TreeTopology, tuple[float, ...]]:
    """The same without observations: by how often the nodes of `tree` are accepted, and how good lookup typically is."""
    heads, chain = list(zip(tree.choices, acceptance, strict=True)), list(_typical_chain())
    shares = _Shares()
    choices: list[Choice] = []
    gains: list[float] = []
    while (heads or chain) and len(choices) < num_nodes - 1:
        # heads first among equals
        nodes = max((nodes for nodes in (heads, chain) if nodes), key=lambda nodes: shares.gain(*nodes[0]))
        choice, accepted = nodes.pop(0)
        choices.append(choice)
        gains.append(shares.add(choice, accepted))
    return TreeTopology(tuple(choices)), tuple(gains)


def typical_gains(topology: TreeTopology, acceptance: Sequence[float]) -> tuple[float, ...]:
    """The gain of each draft node of a tree, by how often those of heads are accepted (any number for those of lookup)."""
    typical, shares = dict(_typical_chain()), _Shares()
    return tuple(
        shares.add(choice, typical.get(choice, 0.0) if is_lookup(choice) else accepted)
        for choice, accepted in zip(topology.choices, acceptance, strict=True)
    )


class _Shares:
    """How often heads, and lookup, have so many tokens right with the nodes added so far. The two are taken as independent."""

    def __init__(self) -> None:
        # by depth
        self._of_heads: defaultdict[int, float] = defaultdict(float)
        self._of_lookup: defaultdict[int, float] = defaultdict(float)

    def gain(self, choice: Choice, accepted: float) -> float:
        others = self._of_heads if is_lookup(choice) else self._of_lookup
        return accepted * (1.0 - others[len(choice)])

    def add(self, choice: Choice, accepted: float) -> float:
        """Returns the gain."""
        gain = self.gain(choice, accepted)
        (self._of_lookup if is_lookup(choice) else self._of_heads)[len(choice)] += accepted
        return gain


def _typical_chain() -> Iterator[tuple[Choice, float]]:
    return zip(lookup_chain(MAX_LOOKUP_DEPTH), TYPICAL_LOOKUP, strict=True)


def _reached(choice: Choice, paths: Sequence[Choice]) -> np.ndarray:
    """Tokens that the node accepts, with those above it, at each place: its depth or 0."""
    return np.array([len(choice) if path[: len(choice)] == choice else 0 for path in paths], dtype=np.int64)
