"""A lookup chain beside the nodes of heads: which of the two the tree grows by, node for node.

Heads and lookup draft at the same time, and a step takes the longer of what they got right. So a node is worth what it adds to
that, its *gain*, which depends on the nodes before it: a step with the first n nodes emits 1 + the sum of their gains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from medusa_core.tree.topology import Choice, TreeTopology, is_lookup, lookup_chain

# Longest chain that is offered: a step's room, results and histograms are made for the deepest path. 16 levels with the root.
MAX_LOOKUP_DEPTH = 15
# What lookup is taken for where it was not measured: how often so many tokens are right, in steps that draft nothing else. The mean
# of Spec-Bench's categories, by answers of the demo model.
TYPICAL_LOOKUP: tuple[float, ...] = (
    0.227, 0.151, 0.119, 0.101, 0.090, 0.082, 0.077, 0.071, 0.067, 0.064, 0.062, 0.059, 0.057, 0.055, 0.054,
)  # fmt: skip


def merge_typical(tree: TreeTopology, acceptance: Sequence[float], num_nodes: int) -> tuple[TreeTopology, tuple[float, ...]]:
    """The tree of at most `num_nodes` nodes, root included, that takes next what has the larger gain, a node of `tree` or one of
    the chain: by how often the nodes of `tree` are accepted, and how good lookup typically is. training/measure.py does better,
    from what was observed.

    Returns:
        The tree, and the gains of its draft nodes.
    """
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
