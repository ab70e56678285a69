"""The shape of a draft tree, without tokens.

A *choice* names a node by the ranks on its path: (0, 2, 1) is head 1's best token, then head 2's third, then head 3's second.
Node 0 is the root (the last known token); node i > 0 is choice i - 1.

One chain of nodes may be filled from the text instead, with what came behind an earlier place that reads alike (prompt lookup):
every rank of its choices is LOOKUP, so they are (-1,), (-1, -1) and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from medusa_core.config import NODE_BUCKETS
from medusa_core.errors import ConfigError

Choice = tuple[int, ...]

# The rank of a node that no head fills.
LOOKUP = -1
MAX_NODES = NODE_BUCKETS[-1]


def is_lookup(choice: Choice) -> bool:
    """Whether the node is filled from the text."""
    return bool(choice) and all(rank == LOOKUP for rank in choice)


def lookup_chain(depth: int) -> tuple[Choice, ...]:
    """The choices of a lookup chain so deep."""
    return tuple((LOOKUP,) * length for length in range(1, depth + 1))


@dataclass(frozen=True)
class TreeTopology:
    """A tree whose parents precede their children, so that its first n nodes are a tree too.

    choices: one per draft node, in node order; the root has none. Raises ConfigError naming the choice that is wrong.
    """

    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        seen: set[Choice] = {()}
        for choice in self.choices:
            if not choice or not (is_lookup(choice) or all(rank >= 0 for rank in choice)):
                raise ConfigError(
                    f"Tree choice {list(choice)} must be one or more ranks, each 0 or greater, or all {LOOKUP} for prompt lookup."
                )
            if choice in seen:
                raise ConfigError(f"Tree choice {list(choice)} appears twice.", hint="Remove one of them.")
            if choice[:-1] not in seen:
                raise ConfigError(
                    f"Tree choice {list(choice)} comes before its parent {list(choice[:-1])}.",
                    hint="List every parent before its children.",
                )
            seen.add(choice)
        if len(seen) > MAX_NODES:
            raise ConfigError(
                f"A tree has at most {MAX_NODES} nodes with its root, got {len(seen)}.", hint="Drop the last choices."
            )

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]], *, num_heads: int | None = None) -> TreeTopology:
        """The tree of these draft nodes. With `num_heads`, a choice of heads deeper than there are heads raises ConfigError."""
        topology = cls(tuple(tuple(choice) for choice in choices))
        if num_heads is not None and topology.head_depth > num_heads:
            deep = next(choice for choice in topology.choices if len(choice) > num_heads and not is_lookup(choice))
            raise ConfigError(
                f"Tree choice {list(deep)} needs {len(deep)} heads, the model has {num_heads}.",
                hint="Use a shallower tree or heads that reach further.",
            )
        return topology

    @classmethod
    def chain(cls, depth: int) -> TreeTopology:
        """Each head's best token, one below the other; depth 0 is the root alone."""
        return cls(tuple((0,) * length for length in range(1, depth + 1)))

    @property
    def num_nodes(self) -> int:
        """Nodes with the root."""
        return len(self.choices) + 1

    @property
    def max_depth(self) -> int:
        """Draft nodes on the longest path; 0 for the root alone."""
        return max(self.depths)

    @property
    def head_depth(self) -> int:
        """Nodes on the longest path that heads fill: how many heads are needed. 0 where they fill none."""
        return max((len(choice) for choice in self.choices if not is_lookup(choice)), default=0)

    @property
    def lookup_depth(self) -> int:
        """Nodes of the lookup chain."""
        return sum(map(is_lookup, self.choices))

    @property
    def max_rank(self) -> int:
        """Highest rank used: heads must offer `max_rank + 1` candidates. -1 where they fill no node."""
        return max(rank for choice in ((-1,), *self.choices) for rank in choice)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Node of each node's parent; -1 for the root."""
        node_of: dict[Choice, int] = {(): 0} | {choice: node for node, choice in enumerate(self.choices, start=1)}
        return (-1, *(node_of[choice[:-1]] for choice in self.choices))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance from the root; a node of depth d holds a candidate of head d (1-based), or the lookup's token number d."""
        return (0, *(len(choice) for choice in self.choices))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each node's token in its head's list; -1 for the root and where there is no list (LOOKUP)."""
        return (-1, *(choice[-1] for choice in self.choices))

    @cached_property
    def head_ranks(self) -> tuple[tuple[int, int], ...]:
        """Head (1-based) and rank of all nodes that heads fill, each pair once, in order."""
        places = set(zip(self.depths, self.ranks, strict=True))
        return tuple(sorted((depth, rank) for depth, rank in places if rank >= 0))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Child nodes of each node, in node order."""
        children: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(tuple(nodes) for nodes in children)

    @cached_property
    def ancestor_mask(self) -> tuple[int, ...]:
        """Bit j of entry i is set where node j lies on the path from the root to node i, both included. Fits 64 bits."""
        masks = [1]
        for node, parent in enumerate(self.parents[1:], start=1):
            masks.append(masks[parent] | 1 << node)
        return tuple(masks)

    def prefix(self, num_nodes: int) -> TreeTopology:
        """The first `num_nodes` nodes, root included; the whole tree where it has no more."""
        return TreeTopology(self.choices[: max(num_nodes - 1, 0)])

    def limit_depth(self, max_depth: int) -> TreeTopology:
        """The nodes that `max_depth` heads can fill, order kept."""
        return TreeTopology(tuple(choice for choice in self.choices if len(choice) <= max_depth and not is_lookup(choice)))
