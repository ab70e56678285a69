"""The KV cache as the scheduler sees it: block tables of requests, prefix sharing, and what is free.

Sharing is safe because only full blocks below a request's confirmed length are indexed, and the device writes only at or behind
that length: a shared block is never written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_core.cache.block_pool import BlockPool
from medusa_core.cache.prefix_index import Parent, PrefixIndex, PrefixNode
from medusa_core.request import Request


@dataclass(frozen=True, slots=True)
class Allocation:
    """A block table, and how many tokens at its start have their KV already."""

    block_ids: list[int]
    num_cached_tokens: int


@dataclass(slots=True)
class _BlockTable:
    """parent: prefix node of the last full block entered in the index. num_indexed: how many full blocks that is."""

    parent: Parent
    block_ids: list[int] = field(default_factory=list)
    num_indexed: int = 0


class CacheManager:
    """Hands blocks to requests. Requests are told apart by `uid`.

    Without the prefix cache the index still serves the choices of one request (n > 1): its entries are salted with the request's
    id and go with the last user of their block.
    """

    def __init__(self, *, num_blocks: int, block_size: int, enable_prefix_cache: bool = True) -> None:
        self.block_size = block_size
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._enable_prefix_cache = enable_prefix_cache
        self._pool = BlockPool(num_blocks)
        self._index = PrefixIndex()
        self._tables: dict[int, _BlockTable] = {}

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks held by no request, those that can still be found by prefix included."""
        return self._pool.num_free

    @property
    def num_used_blocks(self) -> int:
        return self._pool.num_blocks - self._pool.num_free

    def num_blocks_for(self, num_slots: int) -> int:
        """Blocks that hold `num_slots` tokens."""
        return -(-num_slots // self.block_size)

    def lookup(self, request: Request) -> list[PrefixNode]:
        """The cached full blocks at the start of the request's known tokens; at most known - 1 tokens, as one must be computed
        to go on. None of a prompt whose log-probabilities are asked for. Changes nothing."""
        nodes: list[PrefixNode] = []
        if request.needs_prompt_logprobs:
            return nodes
        parent: Parent = self._salt(request)
        for block_idx in range((request.num_known_tokens - 1) // self.block_size):
            node = self._index.find(parent, self._block_tokens(request, block_idx))
            if node is None:
                break
            nodes.append(node)
            parent = node.node_id
        return nodes

    def allocate(self, request: Request, num_slots: int, *, num_spare_blocks: int = 0) -> Allocation | None:
        """Give a request without blocks the cached blocks of its prefix and new ones up to `num_slots`.

        None, with nothing changed, if fewer than `num_spare_blocks` would stay free.
        """
        hits = self.lookup(request)
        num_new = self.num_blocks_for(num_slots) - len(hits)
        num_idle_hits = sum(self._pool.num_users(node.block_id) == 0 for node in hits)
        if self._pool.num_free - num_idle_hits - num_new < num_spare_blocks:
            return None
        table = _BlockTable(parent=hits[-1].node_id if hits else self._salt(request), num_indexed=len(hits))
        for node in hits:
            self._pool.share(node.block_id)
            table.block_ids.append(node.block_id)
        table.block_ids += self._take(num_new)
        self._tables[request.uid] = table
        num_cached_tokens = len(hits) * self.block_size
        if request.num_preemptions == 0 and not request.needs_prompt_logprobs:
            self.num_prefix_query_tokens += request.num_known_tokens
            self.num_prefix_hit_tokens += num_cached_tokens
        return Allocation(list(table.block_ids), num_cached_tokens)

    def num_slots(self, request: Request) -> int:
        """Tokens that the request's blocks can hold."""
        return len(self._tables[request.uid].block_ids) * self.block_size

    def num_blocks_missing(self, request: Request, num_slots: int) -> int:
        """Blocks that `extend` would take."""
        return max(0, self.num_blocks_for(num_slots) - len(self._tables[request.uid].block_ids))

    def extend(self, request: Request, num_slots: int) -> list[int]:
        """Append blocks up to `num_slots` and return them. The caller has seen that enough are free."""
        new_ids = self._take(self.num_blocks_missing(request, num_slots))
        self._tables[request.uid].block_ids += new_ids
        return new_ids

    def commit(self, request: Request, num_computed_tokens: int) -> None:
        """Index the full blocks below `num_computed_tokens`: known tokens whose KV is confirmed to be in the cache."""
        table = self._tables[request.uid]
        for block_idx in range(table.num_indexed, num_computed_tokens // self.block_size):
            tokens = self._block_tokens(request, block_idx)
            table.parent = self._index.insert(table.parent, tokens, table.block_ids[block_idx]).node_id
            table.num_indexed += 1

    def free(self, request: Request) -> None:
        """Release the request's blocks."""
        # Backwards, so that the end of a sequence is reused before its start: a prefix outlives its continuations.
        for block_id in reversed(self._tables.pop(request.uid).block_ids):
            is_valuable = self._enable_prefix_cache and block_id in self._index
            if self._pool.release(block_id, is_valuable=is_valuable) and not is_valuable:
                self._index.discard(block_id)

    def _take(self, num_blocks: int) -> list[int]:
        block_ids = [self._pool.allocate() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._index.discard(block_id)
        return block_ids

    def _salt(self, request: Request) -> str:
        return f"salt {request.cache_salt}" if self._enable_prefix_cache else f"request {request.request_id}"

    def _block_tokens(self, request: Request, block_idx: int) -> tuple[int, ...]:
        start, stop = block_idx * self.block_size, (block_idx + 1) * self.block_size
        num_prompt = request.num_prompt_tokens
        if stop <= num_prompt:
            return tuple(request.prompt_token_ids[start:stop])
        outputs = request.output_token_ids[max(start - num_prompt, 0) : stop - num_prompt]
        return (*request.prompt_token_ids[start:], *outputs)
