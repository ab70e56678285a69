"""Where a lookup chain and the nodes of heads grow into one tree."""

import itertools
import random

import pytest

from medusa_core.tree.merge import MAX_LOOKUP_DEPTH, TYPICAL_LOOKUP, merge_observed, merge_typical, typical_gains
from medusa_core.tree.topology import TreeTopology, lookup_chain

HEADS = TreeTopology(((0,), (1,), (0, 0), (2,), (1, 0), (0, 0, 0)))


def emitted(tree, path, lookup_len):
    heads = sum(path[: len(choice)] == choice for choice in tree.choices)
    return 1 + max(heads, min(lookup_len, tree.lookup_depth))


def mean(tree, places):
    return sum(emitted(tree, *place) for place in places) / len(places)


def drawn_places(num_places):
    """Lookup is right seldom, but then for long, and heads know some of that."""
    generator = random.Random(1)
    places = []
    for _ in range(num_places):
        path = tuple(
            itertools.takewhile(lambda rank: rank is not None, (generator.choice((0, 0, 1, 2, None, None)) for _ in "abc"))
        )
        places.append((path, generator.choice((0, 0, 0, 1, 2, 9, 12))))
    return places


def test_all_nodes_come_in_where_there_is_room():
    tree = merge_observed(HEADS, drawn_places(300), 64)
    assert tree.num_nodes == 1 + len(HEADS.choices) + MAX_LOOKUP_DEPTH
    assert tuple(choice for choice in tree.choices if choice[0] >= 0) == HEADS.choices
    assert tuple(choice for choice in tree.choices if choice[0] < 0) == lookup_chain(MAX_LOOKUP_DEPTH)


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5, 8])
def test_the_first_piece_is_the_best_of_its_size(num_nodes):
    """By brute force, over how many nodes of heads come in and how many of the chain."""
    places = drawn_places(300)
    tree = merge_observed(HEADS, places, num_nodes)
    assert tree.num_nodes == num_nodes
    others = [
        TreeTopology((*HEADS.choices[:count], *lookup_chain(num_nodes - 1 - count)))
        for count in range(min(num_nodes, len(HEADS.choices) + 1))
    ]
    assert mean(tree, places) >= max(mean(other, places) for other in others) - 0.05


def test_a_chain_comes_in_where_only_its_end_pays():
    """Heads have the first two tokens, and lookup has those and four more: one node of the chain adds nothing, six do."""
    places = [((0, 0), 6)] * 9 + [((2,), 0)]
    tree = merge_observed(TreeTopology(((0,), (0, 0), (2,))), places, 64, max_depth=6)
    assert tree.choices == ((0,), (0, 0), *lookup_chain(6), (2,))


def test_without_heads_the_chain_is_the_tree():
    assert merge_observed(TreeTopology(()), [((), 3), ((), 0)], 64, max_depth=4).choices == lookup_chain(4)
    tree, gains = merge_typical(TreeTopology(()), (), 64)
    assert (tree.choices, gains) == (lookup_chain(MAX_LOOKUP_DEPTH), TYPICAL_LOOKUP)


def test_a_lookup_that_is_never_right_comes_last():
    tree = merge_observed(HEADS, [((0, 0, 0), 0), ((1, 0), 0), ((2,), 0)], 9)
    assert tree.choices == (*HEADS.choices, *lookup_chain(2))


def test_typical_trees_take_the_better_of_the_two_at_every_node():
    acceptance = (0.5, 0.1, 0.25, 0.05, 0.02, 0.1)
    tree, gains = merge_typical(HEADS, acceptance, 8)
    assert tree.num_nodes == 8
    assert tree.choices[0] == (0,)
    assert tree.lookup_depth >= 2
    order = dict(zip(HEADS.choices, acceptance, strict=True))
    assert gains == pytest.approx(typical_gains(tree, [order.get(choice, 0.0) for choice in tree.choices]))


def test_two_chances_for_one_token_are_worth_less_than_both_alone():
    gains = typical_gains(TreeTopology(((0,), (-1,), (1,))), (0.5, 0.0, 0.2))
    assert gains == pytest.approx((0.5, TYPICAL_LOOKUP[0] * 0.5, 0.2 * (1 - TYPICAL_LOOKUP[0])))
