"""The tree search against brute force, and against the published accuracies of the 7B heads."""

import itertools
import random

import pytest

from medusa_core.errors import ConfigError
from medusa_core.tree.presets import load_tree
from medusa_core.tree.search import best_observed_tree, best_tree, node_acceptance
from medusa_core.tree.topology import TreeTopology

# Accuracy by rank of the 7B heads 1-4 (top-1 .. top-5), from the cumulative figures published with the original code.
HEADS_7B = [
    [0.560, 0.112, 0.055, 0.033, 0.020],
    [0.316, 0.108, 0.061, 0.043, 0.034],
    [0.201, 0.087, 0.060, 0.035, 0.034],
    [0.147, 0.078, 0.049, 0.037, 0.029],
]


def expected_tokens(tree, accuracy, num_nodes):
    return 1.0 + sum(node_acceptance(tree.prefix(num_nodes), accuracy))


def all_trees(num_draft_nodes, num_heads, num_ranks):
    """Every tree of that many draft nodes, as sets of choices closed under parents."""
    nodes = [path for depth in range(1, num_heads + 1) for path in itertools.product(range(num_ranks), repeat=depth)]
    for choices in itertools.combinations(nodes, num_draft_nodes):
        if all(choice[:-1] in choices or len(choice) == 1 for choice in choices):
            yield TreeTopology(choices)


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5, 6])
def test_no_tree_of_the_same_size_is_better(num_nodes):
    accuracy = [[0.5, 0.3], [0.45, 0.1], [0.4, 0.35]]
    found = best_tree(accuracy, num_nodes)
    best = max(expected_tokens(tree, accuracy, num_nodes) for tree in all_trees(num_nodes - 1, 3, 2))
    assert found.num_nodes == num_nodes
    assert expected_tokens(found, accuracy, num_nodes) == pytest.approx(best)


def test_smaller_trees_are_prefixes_of_larger_ones():
    large = best_tree(HEADS_7B, 64)
    assert all(best_tree(HEADS_7B, num_nodes) == large.prefix(num_nodes) for num_nodes in (1, 2, 9, 33, 64))


def test_expected_tokens_grow_ever_slower():
    tree = best_tree(HEADS_7B, 64)
    gains = [expected_tokens(tree, HEADS_7B, n + 1) - expected_tokens(tree, HEADS_7B, n) for n in range(1, tree.num_nodes)]
    assert all(gain > 0 for gain in gains)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(gains))


def test_published_figures_of_the_7b_heads():
    tree = best_tree(HEADS_7B, 64)
    figures = {2: 1.56, 3: 1.74, 4: 1.85, 5: 1.91, 7: 2.00, 9: 2.07}
    assert {n: round(expected_tokens(tree, HEADS_7B, n), 2) for n in figures} == figures
    chain = TreeTopology.chain(4)
    assert [round(expected_tokens(chain, HEADS_7B, n), 2) for n in (2, 3, 4, 5)] == [1.56, 1.74, 1.77, 1.78]


def test_the_search_beats_the_published_tree_on_its_own_accuracies():
    published = load_tree("mc_sim_7b_63")
    for num_nodes in (4, 8, 16, 32, 64):
        ours = expected_tokens(best_tree(HEADS_7B, num_nodes), HEADS_7B, num_nodes)
        assert ours >= expected_tokens(published, HEADS_7B, num_nodes)


def test_the_root_alone_emits_one_token():
    assert best_tree(HEADS_7B, 1) == TreeTopology.chain(0)
    assert expected_tokens(load_tree("mc_sim_7b_63"), HEADS_7B, 1) == 1.0


def test_few_candidates_give_a_small_tree():
    assert best_tree([[0.5, 0.2]], 64).choices == ((0,), (1,))
    assert best_tree([], 64).num_nodes == 1


def test_nodes_without_a_measured_accuracy_count_nothing():
    tree = TreeTopology.from_choices([(0,), (7,), (0, 0)])
    assert expected_tokens(tree, [[0.5, 0.2]], 4) == 1.5


@pytest.mark.parametrize(("accuracy", "message"), [([[0.2, 0.4]], "head 1 must not increase"), ([[0.5], [1.5]], "head 2 must lie")])
def test_impossible_accuracies_are_refused(accuracy, message):
    with pytest.raises(ConfigError, match=message):
        best_tree(accuracy, 4)


def emitted(tree, path):
    """Tokens of a step at a position where the right tokens have these ranks."""
    return 1 + sum(path[: len(choice)] == choice for choice in tree.choices)


def drawn_paths(num_paths, seed=0):
    """Heads that tend to be right together: where the first is, so is the second."""
    generator = random.Random(seed)
    paths = []
    for _ in range(num_paths):
        first = generator.choice((0, 0, 0, 1, 2, None))
        if first is None:
            paths.append(())
            continue
        second = generator.choice((0, 0, 1) if first == 0 else (2, None, None))
        paths.append((first,) if second is None else (first, second))
    return paths


def marginals(paths, num_heads, num_ranks):
    def share(head, rank):
        return sum(path[head : head + 1] == (rank,) for path in paths) / len(paths)

    return [[share(head, rank) for rank in range(num_ranks)] for head in range(num_heads)]


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5])
def test_no_tree_of_the_same_size_emits_more_on_the_observed_paths(num_nodes):
    paths = drawn_paths(400)
    tree, acceptance = best_observed_tree(paths, marginals(paths, 2, 3), num_nodes, prior_weight=0.0)
    mean = sum(emitted(tree, path) for path in paths) / len(paths)
    assert mean == pytest.approx(1.0 + sum(acceptance))
    best = max(sum(emitted(other, path) for path in paths) for other in all_trees(num_nodes - 1, 2, 3)) / len(paths)
    assert mean == pytest.approx(best)


def test_observed_trees_know_what_independent_heads_would_not():
    paths = drawn_paths(4000)
    accuracy = marginals(paths, 2, 3)
    observed, acceptance = best_observed_tree(paths, accuracy, 9)
    independent = best_tree(accuracy, 9)
    fresh = drawn_paths(4000, seed=1)
    assert sum(emitted(observed, path) for path in fresh) > sum(emitted(independent, path) for path in fresh)
    assert all(later <= earlier for earlier, later in itertools.pairwise(acceptance))
    assert best_observed_tree(paths, accuracy, 4)[0] == observed.prefix(4)


def test_levels_that_cost_are_opened_where_they_pay():
    paths = drawn_paths(4000)
    accuracy = marginals(paths, 2, 3)
    free, _ = best_observed_tree(paths, accuracy, 9)
    # the second level's best node is accepted in a third of the steps, a node of the first in a sixth or more
    costly, acceptance = best_observed_tree(paths, accuracy, 9, level_cost=0.3)
    assert free.choices[:2] == ((0,), (0, 0))
    assert costly.choices[:3] == ((0,), (1,), (2,))
    assert sorted(costly.choices) == sorted(free.choices)
    shares = dict(zip(costly.choices, acceptance, strict=True))
    assert all(share <= shares.get(choice[:-1], 1.0) for choice, share in shares.items())
    # a level that never pays is opened when the others are used up
    never, _ = best_observed_tree(paths, accuracy, 9, level_cost=2.0)
    assert [len(choice) for choice in never.choices] == [1, 1, 1, 2, 2, 2, 2, 2]


# sizes that are not just behind the opening of a level, where a prefix may lag
@pytest.mark.parametrize(("num_nodes", "level_cost"), [(2, 0.02), (3, 0.02), (4, 0.1), (5, 0.1), (3, 0.3), (4, 0.3)])
def test_no_tree_of_the_same_size_is_better_after_what_levels_cost(num_nodes, level_cost):
    paths = drawn_paths(400)

    def worth(tree):
        return sum(emitted(tree, path) for path in paths) / len(paths) - level_cost * tree.max_depth

    found, _ = best_observed_tree(paths, marginals(paths, 2, 3), num_nodes, prior_weight=0.0, level_cost=level_cost)
    assert worth(found) == pytest.approx(max(worth(other) for other in all_trees(num_nodes - 1, 2, 3)))


@pytest.mark.parametrize("level_cost", [0.0, 0.03, 0.07, 0.5])
@pytest.mark.parametrize("best", [0.1, 0.3, 0.7])
def test_a_tree_has_all_the_nodes_that_are_asked_for(level_cost, best):
    ranks = [0.2 * best / (1 + rank) for rank in range(9)]
    accuracy = [[best, *ranks], *([0.5 * best, *ranks],) * 4]
    tree, acceptance = best_observed_tree([()], accuracy, 64, prior_weight=1e6, level_cost=level_cost)
    assert tree.num_nodes == 64 == len(acceptance) + 1


def test_a_parent_seen_once_says_little_about_its_children():
    paths = [(0,)] * 50 + [(1, 1)] + [()] * 49
    accuracy = [[0.5, 0.01], [0.4, 0.01]]
    tree, acceptance = best_observed_tree(paths, accuracy, 7)
    shares = dict(zip(tree.choices, acceptance, strict=True))
    assert shares[1, 1] < 0.1 * shares[(1,)]


def test_no_positions_give_no_tree():
    with pytest.raises(ConfigError, match="no positions"):
        best_observed_tree([], HEADS_7B, 8)
