"""Finds blocks by the tokens they hold and all tokens before them.

Each indexed block is a node under the node of the block before it; the first block of a sequence hangs under a *salt*, so that
sequences with different salts share nothing. The dictionary below hashes (parent, tokens) and compares the tokens on every hit: a
hash collision can never mix two prefixes. Node ids are not reused, so a child cannot come to hang under a stranger that took its
parent's block; it is unreachable until its own block is reused.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

# The id of the node before, or the salt for the first block.
Parent = int | str


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """A full block in the index."""

    node_id: int
    parent: Parent
    token_ids: tuple[int, ...]
    block_id: int


class PrefixIndex:
    """Maps (parent, tokens of one full block) to the block that holds them."""

    def __init__(self) -> None:
        self._by_content: dict[tuple[Parent, tuple[int, ...]], PrefixNode] = {}
        self._by_block: dict[int, PrefixNode] = {}
        self._node_ids = itertools.count()

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._by_block

    def find(self, parent: Parent, token_ids: tuple[int, ...]) -> PrefixNode | None:
        """The node with these tokens under that parent."""
        return self._by_content.get((parent, token_ids))

    def insert(self, parent: Parent, token_ids: tuple[int, ...], block_id: int) -> PrefixNode:
        """Index a block and return its node. Content that is indexed already keeps its block: then that node is returned."""
        known = self.find(parent, token_ids)
        if known is not None:
            return known
        node = PrefixNode(next(self._node_ids), parent, token_ids, block_id)
        self._by_content[parent, token_ids] = node
        self._by_block[block_id] = node
        return node

    def discard(self, block_id: int) -> None:
        """Forget a block, if it is indexed."""
        node = self._by_block.pop(block_id, None)
        if node is not None:
            del self._by_content[node.parent, node.token_ids]
