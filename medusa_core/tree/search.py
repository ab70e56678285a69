"""The tree that emits most tokens per step, for what was measured of the heads.

`best_tree` knows marginal accuracies: `rank_accuracy[k][r]` is how often head k's (0-based) token of rank r is the right one.
Taking the heads as independent, a node is accepted with the product of the accuracies on its path. `best_observed_tree` knows what
the heads got right together, position by position, and needs no such assumption. A step emits 1 + the sum over its draft nodes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from medusa_core.errors import ConfigError
from medusa_core.tree.topology import Choice, TreeTopology, is_lookup


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


def best_observed_tree(
    paths: Iterable[Choice],
    rank_accuracy: Sequence[Sequence[float]],
    num_nodes: int,
    *,
    prior_weight: float = 50.0,
    level_cost: float = 0.0,
) -> tuple[TreeTopology, tuple[float, ...]]:
    """The best tree of `num_nodes` nodes, root included, for observed paths: best node first, each prefix the best of its size.
    Fewer nodes come back where the ranks listed allow no more.

    Heads that draft level by level take longer for a deeper tree. With a `level_cost` a level is opened where the tree has grown so
    large that the level's nodes bring that much more than those they replace, or has no other nodes left; right behind that, a
    prefix may not yet be the best.

    A node is accepted as often as its parent is, times how often its rank is right where its parent is. Rarely seen parents say
    little about that, so the head's accuracy anywhere joins in, as if it had been seen at `prior_weight` positions more.

    Args:
        paths: for each position the ranks of the right tokens in the heads' lists, the first head's first, cut before the first
            that was not in the list.
        rank_accuracy: as for `best_tree`; ranks may be in any order here. Only ranks listed are offered.
        level_cost: what a level takes to draft, in tokens that a step would emit in that time.

    Returns:
        The tree, and how often each of its draft nodes is accepted.

    Raises:
        ConfigError: accuracies outside 0..1, or no path at all.
    """
    _check_range(rank_accuracy)
    num_seen = Counter(path[:length] for path in paths for length in range(len(path) + 1))
    if not num_seen:
        raise ConfigError("There are no positions to choose a tree for.")

    def best_first(num_levels: int) -> list[tuple[Choice, float]]:
        """Nodes of at most so many levels, and how often they are accepted."""
        nodes: list[tuple[Choice, float]] = []
        heap: list[tuple[float, int, Choice]] = [(-1.0, 0, ())]
        while heap and len(nodes) < num_nodes:
            negative, _, choice = heapq.heappop(heap)
            nodes.append((choice, -negative))
            num_parent = num_seen[choice] + prior_weight
            for rank, accuracy in enumerate(rank_accuracy[len(choice)] if len(choice) < num_levels else ()):
                child = (*choice, rank)
                share = (num_seen[child] + prior_weight * accuracy) / num_parent
                heapq.heappush(heap, (negative * share, len(child), child))
        # without the root
        return nodes[1:]

    by_levels = [best_first(num_levels) for num_levels in range(1, len(rank_accuracy) + 1)]
    gains = [[0.0, *itertools.accumulate(accepted for _, accepted in nodes)] for nodes in by_levels]
    chosen: dict[Choice, float] = {}
    num_levels = 0
    for size in range(1, max((len(nodes) for nodes in by_levels), default=0) + 1):
        values = [gain[min(size, len(gain) - 1)] - level_cost * levels for levels, gain in enumerate(gains, start=1)]
        # the fewest of equally good ones; a level that is open stays so
        num_levels = max(num_levels, 1 + max(range(len(values)), key=values.__getitem__))
        # where the open levels are used up, the next one has to open
        while all(choice in chosen for choice, _ in by_levels[num_levels - 1]) and num_levels < len(by_levels):
            num_levels += 1
        chosen.update(itertools.islice((node for node in by_levels[num_levels - 1] if node[0] not in chosen), 1))
    return TreeTopology(tuple(chosen)), tuple(chosen.values())


def node_acceptance(topology: TreeTopology, rank_accuracy: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """How often each draft node is accepted if the heads are independent; 0 where no accuracy was measured (deeper heads, higher
    ranks) and for lookup nodes."""
    return tuple(_probability(choice, rank_accuracy) for choice in topology.choices)


def _probability(choice: Choice, rank_accuracy: Sequence[Sequence[float]]) -> float:
    if len(choice) > len(rank_accuracy) or is_lookup(choice):
        return 0.0
    return math.prod(accuracy[rank] if rank < len(accuracy) else 0.0 for rank, accuracy in zip(choice, rank_accuracy, strict=False))


def _check_range(rank_accuracy: Sequence[Sequence[float]]) -> None:
    for head, accuracy in enumerate(rank_accuracy, start=1):
        if not all(0.0 <= value <= 1.0 for value in accuracy):
            raise ConfigError(f"Accuracies of head {head} must lie between 0 and 1.")


def _check(rank_accuracy: Sequence[Sequence[float]]) -> None:
    _check_range(rank_accuracy)
    for head, accuracy in enumerate(rank_accuracy, start=1):
        if any(later > earlier for earlier, later in itertools.pairwise(accuracy)):
            raise ConfigError(f"Accuracies of head {head} must not increase with the rank.", hint="Sort them.")
