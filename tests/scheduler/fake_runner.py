"""A device without a model: it executes plans to the letter and checks every block it is given.

The pseudo-model's next token is a hash of the noise key and all known tokens, so the right output of a request does not depend on
how it is scheduled. A memory slot holds the hash of all tokens up to its own; reading anything else than the lane's own prefix is
a failure, and so is writing a block that two lanes hold.
"""

import random
import zlib
from dataclasses import dataclass

from medusa_core.outputs import FinishReason
from medusa_core.plan import LaneResult, StepResult

VOCAB_SIZE = 23


def content(tokens):
    """What the KV of the last of these tokens depends on."""
    return zlib.crc32(repr(list(tokens)).encode())


def next_token(noise_key, tokens):
    return zlib.crc32(repr((noise_key, list(tokens))).encode()) % VOCAB_SIZE


def finish_reason(tokens, params, max_total_tokens):
    if tokens[-1] in params.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(tokens) >= max_total_tokens else None


def plain_output(prompt, noise_key, params, max_total_tokens):
    """The output whatever the schedule: (token ids, finish reason)."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(noise_key, tokens))
        reason = finish_reason(tokens, params, max_total_tokens)
        if reason is not None:
            return tokens[len(prompt) :], reason


@dataclass
class FakeLane:
    join: object
    tokens: list
    block_ids: list
    num_computed: int
    reason: FinishReason | None = None


class FakeRunner:
    """Executes a plan at once; the caller decides when to hand the result to the scheduler."""

    def __init__(self, *, num_blocks, block_size, max_depth=3, seed=0):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_depth = max_depth
        self.rng = random.Random(seed)
        self.lanes = {}
        self.memory = {}
        self.computed_tokens = 0
        self.plans = []

    def submit(self, plan):
        assert not plan.is_empty
        self.plans.append(plan)
        for lane in plan.leaves:
            del self.lanes[lane]
        for join in plan.joins:
            self._join(join)
        for append in plan.block_appends:
            self.lanes[append.lane].block_ids += append.block_ids
        self._check_tables()
        rows = [chunk.lane for chunk in plan.chunks] + [lane for group in plan.decode_groups for lane in group.lanes]
        assert len(rows) == len(set(rows)), "a lane has rows twice in one step"
        results = [self._prefill(chunk) for chunk in plan.chunks]
        for group in plan.decode_groups:
            results += [self._decode(lane, group.num_nodes) for lane in group.lanes]
        return StepResult(step_id=plan.step_id, lanes=[result for result in results if result is not None])

    def _join(self, join):
        assert join.lane not in self.lanes, "two requests on one lane"
        assert 0 <= join.num_computed_tokens < len(join.token_ids)
        lane = FakeLane(join, list(join.token_ids), list(join.block_ids), join.num_computed_tokens)
        self.lanes[join.lane] = lane
        self._read(lane, join.num_computed_tokens)

    def _check_tables(self):
        for lane in self.lanes.values():
            assert len(lane.block_ids) == len(set(lane.block_ids))
            assert all(0 <= block_id < self.num_blocks for block_id in lane.block_ids)

    def _prefill(self, chunk):
        lane = self.lanes[chunk.lane]
        stop = chunk.start + chunk.num_tokens
        assert chunk.start == lane.num_computed, "chunks leave a gap or overlap"
        assert chunk.num_tokens > 0
        assert chunk.is_last == (stop == len(lane.tokens))
        for position in range(chunk.start, stop):
            self._write(lane, position, content(lane.tokens[: position + 1]))
        self._read(lane, stop)
        lane.num_computed = stop
        self.computed_tokens += chunk.num_tokens
        if not chunk.is_last:
            return None
        return self._emit(lane, 1, num_nodes=1)

    def _decode(self, lane_id, num_nodes):
        lane = self.lanes[lane_id]
        # A finished lane keeps its rows in the step; even so it may write only to slots reserved for it.
        length = min(lane.num_computed, len(lane.tokens) - 1)
        if lane.reason is None:
            assert length == len(lane.tokens) - 1, "decodes before its prompt is computed"
            self._read(lane, length)
        for node in range(num_nodes):
            self._write(lane, length + node, f"tree node {node}")
        if lane.reason is not None:
            return LaneResult(lane=lane_id, uid=lane.join.uid, token_ids=[])
        num_accepted = self.rng.randint(0, min(self.max_depth, num_nodes - 1))
        result = self._emit(lane, num_accepted + 1, num_nodes=num_nodes)
        for position in range(length, len(lane.tokens) - 1):
            self._write(lane, position, content(lane.tokens[: position + 1]))
        lane.num_computed = len(lane.tokens) - 1
        return result

    def _emit(self, lane, num_tokens, *, num_nodes):
        emitted = []
        while len(emitted) < num_tokens and lane.reason is None:
            lane.tokens.append(next_token(lane.join.noise_key, lane.tokens))
            emitted.append(lane.tokens[-1])
            lane.reason = finish_reason(lane.tokens, lane.join.params, lane.join.max_total_tokens)
        return LaneResult(
            lane=lane.join.lane,
            uid=lane.join.uid,
            token_ids=emitted,
            num_draft_nodes=num_nodes - 1,
            draft_depth=min(self.max_depth, num_nodes - 1),
            num_accepted=min(num_tokens - 1, len(emitted)),
            # as if node n were at depth n
            credit=sum(2 << level for level in range(min(num_tokens - 1, len(emitted)))),
            finish_reason=lane.reason,
        )

    def _slot(self, lane, position):
        return lane.block_ids[position // self.block_size], position % self.block_size

    def _read(self, lane, length):
        for position in range(length):
            assert self.memory.get(self._slot(lane, position)) == content(lane.tokens[: position + 1]), "reads foreign KV"

    def _write(self, lane, position, value):
        block_id, offset = self._slot(lane, position)
        num_holders = sum(block_id in other.block_ids for other in self.lanes.values())
        assert num_holders == 1, "writes a shared block"
        self.memory[block_id, offset] = value
