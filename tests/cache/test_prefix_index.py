"""The prefix index: exact matches along a chain, and nothing else."""

from medusa_core.cache.prefix_index import PrefixIndex


class SameHash(tuple):
    """Token tuples that all collide, as an attacker would choose them."""

    __slots__ = ()

    def __hash__(self):
        return 7


def test_a_block_is_found_under_its_parent_only():
    index = PrefixIndex()
    first = index.insert("", (1, 2), block_id=5)
    second = index.insert(first.node_id, (3, 4), block_id=6)
    assert index.find("", (1, 2)) is first
    assert index.find(first.node_id, (3, 4)) is second
    assert index.find("", (3, 4)) is None


def test_salts_share_nothing():
    index = PrefixIndex()
    index.insert("a", (1, 2), block_id=0)
    assert index.find("b", (1, 2)) is None


def test_equal_content_is_indexed_once():
    index = PrefixIndex()
    first = index.insert("", (1, 2), block_id=0)
    assert index.insert("", (1, 2), block_id=1) is first
    assert 1 not in index
    assert len(index) == 1


def test_colliding_hashes_are_told_apart():
    index = PrefixIndex()
    index.insert("", SameHash((1, 2)), block_id=0)
    other = index.insert("", SameHash((9, 9)), block_id=1)
    assert index.find("", SameHash((9, 9))) is other
    assert index.find("", SameHash((5, 5))) is None


def test_a_child_never_hangs_under_the_block_that_replaced_its_parent():
    index = PrefixIndex()
    parent = index.insert("", (1, 2), block_id=0)
    index.insert(parent.node_id, (3, 4), block_id=1)
    index.discard(0)
    stranger = index.insert("", (8, 8), block_id=0)
    assert index.find(stranger.node_id, (3, 4)) is None
    index.discard(1)
    assert len(index) == 1


def test_discarding_an_unknown_block_does_nothing():
    index = PrefixIndex()
    index.discard(3)
    assert len(index) == 0
