"""Physical blocks: who holds them, and which one is reused next. Every operation is O(1)."""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Reference counts, and the free blocks in the order in which they will be reused.

    A free block may still hold tokens worth finding again. Such blocks are freed to the far end, so that blocks without value are
    reused first and then the one that has been idle longest.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_users = [0] * num_blocks
        # An OrderedDict because a block found again leaves from the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_users(self, block_id: int) -> int:
        return self._num_users[block_id]

    def allocate(self) -> int:
        """Hand out the next block to one user. Raises KeyError when none is free: callers look at `num_free` first."""
        block_id, _ = self._free.popitem(last=False)
        self._num_users[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add a user; a free block leaves the free list with what it holds."""
        if self._num_users[block_id] == 0:
            del self._free[block_id]
        self._num_users[block_id] += 1

    def release(self, block_id: int, *, is_valuable: bool) -> bool:
        """Remove a user; True if the block is free now. Free `is_valuable` blocks are reused last.

        Raises ValueError if the block has no user.
        """
        if self._num_users[block_id] == 0:
            raise ValueError(f"Block {block_id} is free already.")
        self._num_users[block_id] -= 1
        if self._num_users[block_id] > 0:
            return False
        self._free[block_id] = None
        self._free.move_to_end(block_id, last=is_valuable)
        return True
