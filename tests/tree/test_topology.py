"""Tree topologies: what is derived from choices, and which choices are refused."""

import pytest

from medusa_core.errors import ConfigError
from medusa_core.tree.topology import TreeTopology, lookup_chain

SMALL = TreeTopology.from_choices([(0,), (1,), (0, 0), (0, 2), (0, 2, 1)])


def test_derived_fields_of_a_small_tree():
    assert SMALL.num_nodes == 6
    assert SMALL.parents == (-1, 0, 0, 1, 1, 4)
    assert SMALL.depths == (0, 1, 1, 2, 2, 3)
    assert SMALL.ranks == (-1, 0, 1, 0, 2, 1)
    assert SMALL.children == ((1, 2), (3, 4), (), (), (5,), ())
    assert SMALL.ancestor_mask == (0b1, 0b11, 0b101, 0b1011, 0b10011, 0b110011)
    assert (SMALL.max_depth, SMALL.max_rank) == (3, 2)


def test_the_root_alone_is_a_tree():
    root = TreeTopology.chain(0)
    assert (root.num_nodes, root.max_depth, root.max_rank) == (1, 0, -1)
    assert root.parents == (-1,)
    assert root.ancestor_mask == (1,)


def test_a_chain_has_one_path():
    assert TreeTopology.chain(3).parents == (-1, 0, 1, 2)


def test_every_prefix_is_a_tree_with_the_same_first_nodes():
    for num_nodes in range(1, SMALL.num_nodes + 1):
        prefix = SMALL.prefix(num_nodes)
        assert prefix.num_nodes == num_nodes
        assert prefix.parents == SMALL.parents[:num_nodes]
        assert prefix.ancestor_mask == SMALL.ancestor_mask[:num_nodes]
    assert SMALL.prefix(99) == SMALL


def test_limit_depth_drops_only_the_nodes_too_deep():
    assert SMALL.limit_depth(1).choices == ((0,), (1,))
    assert SMALL.limit_depth(0) == TreeTopology.chain(0)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([(0,), (1, 0)], r"\[1, 0\] comes before its parent \[1\]"),
        ([(0, 0), (0,)], r"\[0, 0\] comes before its parent \[0\]"),
        ([(0,), (1,), (0,)], r"\[0\] appears twice"),
        ([()], r"\[\] must be one or more ranks"),
        ([(0,), (-2,)], r"\[-2\] must be one or more ranks"),
        ([(0,), (0, -1)], r"\[0, -1\] must be one or more ranks"),
        ([(-1,), (-1, 0)], r"\[-1, 0\] must be one or more ranks"),
        ([(-1, -1)], r"\[-1, -1\] comes before its parent \[-1\]"),
        ([(rank,) for rank in range(64)], "at most 64 nodes with its root, got 65"),
    ],
)
def test_wrong_choices_are_named(choices, message):
    with pytest.raises(ConfigError, match=message):
        TreeTopology.from_choices(choices)


def test_a_lookup_chain_stands_beside_the_nodes_of_heads():
    tree = TreeTopology.from_choices([(0,), (-1,), (-1, -1), (0, 1), (-1, -1, -1)], num_heads=2)
    assert tree.parents == (-1, 0, 0, 2, 1, 3)
    assert tree.ranks == (-1, 0, -1, -1, 1, -1)
    assert (tree.max_depth, tree.head_depth, tree.lookup_depth, tree.max_rank) == (3, 2, 3, 1)
    assert tree.prefix(3).lookup_depth == 1
    assert tree.limit_depth(1).choices == ((0,),)
    with pytest.raises(ConfigError, match=r"\[0, 1\] needs 2 heads"):
        TreeTopology.from_choices(tree.choices, num_heads=1)


def test_a_lookup_chain_alone_needs_no_heads():
    tree = TreeTopology.from_choices(lookup_chain(3), num_heads=0)
    assert tree.choices == ((-1,), (-1, -1), (-1, -1, -1))
    assert (tree.max_depth, tree.head_depth, tree.lookup_depth, tree.max_rank) == (3, 0, 3, -1)


def test_sixty_four_nodes_are_allowed():
    assert TreeTopology.from_choices([(rank,) for rank in range(63)]).num_nodes == 64


def test_a_choice_deeper_than_the_heads_is_named():
    assert TreeTopology.from_choices(SMALL.choices, num_heads=3) == SMALL
    with pytest.raises(ConfigError, match=r"\[0, 2, 1\] needs 3 heads, the model has 2"):
        TreeTopology.from_choices(SMALL.choices, num_heads=2)
