"""The block pool: order of reuse, reference counts, and misuse."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from medusa_core.cache.block_pool import BlockPool


def test_blocks_without_value_are_reused_first_then_the_longest_idle():
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(4)]
    for block_id, is_valuable in [(2, True), (0, True), (3, False), (1, True)]:
        pool.release(block_id, is_valuable=is_valuable)
    assert blocks == [0, 1, 2, 3]
    assert [pool.allocate() for _ in range(4)] == [3, 2, 0, 1]


def test_a_shared_block_is_free_only_after_its_last_user():
    pool = BlockPool(1)
    block_id = pool.allocate()
    pool.share(block_id)
    assert pool.release(block_id, is_valuable=True) is False
    assert pool.num_free == 0
    assert pool.release(block_id, is_valuable=True) is True
    assert pool.num_free == 1


def test_a_free_block_can_be_taken_back_by_name():
    pool = BlockPool(3)
    pool.share(1)
    assert pool.num_users(1) == 1
    assert [pool.allocate(), pool.allocate()] == [0, 2]


def test_releasing_a_free_block_is_an_error():
    with pytest.raises(ValueError, match="Block 0 is free already"):
        BlockPool(1).release(0, is_valuable=False)


def test_an_empty_pool_has_nothing_to_give():
    with pytest.raises(KeyError):
        BlockPool(0).allocate()


class PoolMachine(RuleBasedStateMachine):
    """Random use against a dictionary of user counts."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(5)
        self.users = {}

    @precondition(lambda self: self.pool.num_free > 0)
    @rule()
    def allocate(self):
        block_id = self.pool.allocate()
        assert self.users.get(block_id, 0) == 0
        self.users[block_id] = 1

    @rule(block_id=st.integers(0, 4))
    def share(self, block_id):
        self.pool.share(block_id)
        self.users[block_id] = self.users.get(block_id, 0) + 1

    @rule(block_id=st.integers(0, 4), is_valuable=st.booleans())
    def release(self, block_id, is_valuable):
        if self.users.get(block_id, 0) > 0:
            self.users[block_id] -= 1
            assert self.pool.release(block_id, is_valuable=is_valuable) is (self.users[block_id] == 0)

    @invariant()
    def counts_agree(self):
        assert all(self.pool.num_users(block_id) == self.users.get(block_id, 0) for block_id in range(5))
        assert self.pool.num_free == 5 - sum(count > 0 for count in self.users.values())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
