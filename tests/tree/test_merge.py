"""Where a lookup chain and the nodes of heads grow into one tree."""

import pytest

from medusa_core.tree.merge import MAX_LOOKUP_DEPTH, TYPICAL_LOOKUP, merge_typical, typical_gains
from medusa_core.tree.topology import TreeTopology, lookup_chain

HEADS = TreeTopology(((0,), (1,), (0, 0), (2,), (1, 0), (0, 0, 0)))


def test_without_heads_the_chain_is_the_tree():
    tree, gains = merge_typical(TreeTopology(()), (), 64)
    assert (tree.choices, gains) == (lookup_chain(MAX_LOOKUP_DEPTH), TYPICAL_LOOKUP)


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
