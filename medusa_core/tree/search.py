"""The tree that emits most tokens per step, for measured accuracies.

Accuracies are marginal: `rank_accuracy[k][r]` is how often head k's (0-based) token of rank r is the right one. Taking the heads as
independent, a node is reached with the product of the accuracies on its path, and a step emits 1 + the sum over its draft nodes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

from medusa_core.errors import ConfigError
from medusa_core.tree.topology import Choice, TreeTopology


def best_tree(rank_accuracy: Sequence[Sequence[float]], num_nodes: int) -> TreeTopology:
    """The best tree of `num_nodes` nodes, root included, best node first: each prefix is the best tree of its size.

    A node enters the heap when its parent and its better sibling have left it, so each is generated once. Ranks of a head are
    tried in the order given, which must not increase. Fewer nodes come back where the accuracies allow no more.
    Raises ConfigError for accuracies outside 0..1 or out of order.
    """
    _check(rank_accuracy)
    # Ties go to the shallower, then the lower rank: the tree does not depend on the heap's internals.
    heap: list[tuple[float, int, Choice]] = []

    def offer(choice: Choice) -> None:
        head = len(choice) - 1
        if head < len(rank_accuracy) and choice[-1] < len(rank_accuracy[head]):
            heapq.heappush(heap, (-_probability(choice, rank_accuracy), len(choice), choice))

    choices: list[Choice] = []
    offer((0,))
    while heap and len(choices) < num_nodes - 1:
        _, _, choice = heapq.heappop(heap)
        choices.append(choice)
        offer((*choice[:-1], choice[-1] + 1))
        offer((*choice, 0))
    return TreeTopology(tuple(choices))


def expected_tokens(topology: TreeTopology, rank_accuracy: Sequence[Sequence[float]], num_nodes: int) -> float:
    """Tokens a step emits on average with the first `num_nodes` nodes, root included: 1 for the root alone.

    Nodes without a measured accuracy (deeper heads, higher ranks) count as never right.
    """
    return 1.0 + sum(_probability(choice, rank_accuracy) for choice in topology.choices[: max(num_nodes - 1, 0)])


def _probability(choice: Choice, rank_accuracy: Sequence[Sequence[float]]) -> float:
    if len(choice) > len(rank_accuracy):
        return 0.0
    return math.prod(accuracy[rank] if rank < len(accuracy) else 0.0 for rank, accuracy in zip(choice, rank_accuracy, strict=False))


def _check(rank_accuracy: Sequence[Sequence[float]]) -> None:
    for head, accuracy in enumerate(rank_accuracy, start=1):
        if not all(0.0 <= value <= 1.0 for value in accuracy):
            raise ConfigError(f"Accuracies of head {head} must lie between 0 and 1.")
        if any(later > earlier for earlier, later in itertools.pairwise(accuracy)):
            raise ConfigError(f"Accuracies of head {head} must not increase with the rank.", hint="Sort them.")
