"""Times whole steps on any plan.Runner, by submitting plans on lanes that no request uses.

Two steps are on their way at once, as in serving, so what is measured is the time between results: the device's time where the
device is the slower side, the host's where the host is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from medusa_core.errors import ConfigError
from medusa_core.params import SamplingParams
from medusa_core.plan import DecodeGroup, LaneJoin, PendingStep, PrefillChunk, Runner, StepPlan

DraftTimer = Callable[[int, int], float]

_NUM_WARM_UP_STEPS = 5


class StepProfiler:
    """Measures steps of a runner whose engine is idle. Every block of the cache is overwritten: nothing may be cached in it.

    max_depth: longest path of the tree in draft nodes. max_step_rows: most lanes x nodes of a step.
    draft_timer: (lanes, nodes) -> seconds of drafting alone, where the device side can tell.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_lanes: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        vocab_size: int,
        max_depth: int,
        max_step_rows: int,
        max_step_tokens: int,
        draft_timer: DraftTimer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._num_lanes = num_lanes
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._max_depth = max_depth
        self._max_step_rows = max_step_rows
        self._max_step_tokens = max_step_tokens
        self._draft_timer = draft_timer
        self._clock = clock
        self._random = random.Random(0)
        self._next_uid = 0

    def why_not(self, num_lanes: int, num_nodes: int, context_len: int, num_steps: int = 50) -> str | None:
        """The reason why `step_seconds` cannot measure this, or None."""
        num_tokens = self._lane_tokens(num_nodes, context_len, num_steps)
        if num_lanes > self._num_lanes:
            return f"{num_lanes} lanes, the engine has {self._num_lanes}"
        if num_lanes * num_nodes > self._max_step_rows:
            return f"{num_lanes} x {num_nodes} rows exceed max_step_rows ({self._max_step_rows})"
        if num_tokens > self._max_model_len:
            return f"{num_tokens} tokens per lane exceed max_model_len ({self._max_model_len})"
        if num_lanes * self._lane_blocks(num_tokens) > self._num_blocks:
            return f"{num_lanes} x {self._lane_blocks(num_tokens)} blocks, the cache has {self._num_blocks}"
        return None

    def step_seconds(self, num_lanes: int, num_nodes: int, context_len: int, params: SamplingParams, num_steps: int = 50) -> float:
        """Median seconds between the results of decode steps.

        `num_lanes` lanes of `context_len` random known tokens each, in blocks of their own, are prefilled in chunks and then
        decoded with `num_nodes` nodes per lane, the next step submitted before the last one's result is read. The lanes are left
        free. Raises ConfigError for what does not fit (`why_not`).
        """
        with self.decoding(num_lanes, num_nodes, context_len, params, num_steps) as run:
            seconds = run(num_steps)
        return sorted(seconds)[len(seconds) // 2]

    @contextmanager
    def decoding(
        self, num_lanes: int, num_nodes: int, context_len: int, params: SamplingParams, num_steps: int
    ) -> Iterator[Callable[[int], list[float]]]:
        """Lanes prefilled and warmed up; the callable runs steps, at most `num_steps` in all, and returns the seconds of each.

        Raises ConfigError for what does not fit (`why_not`).
        """
        reason = self.why_not(num_lanes, num_nodes, context_len, num_steps)
        if reason is not None:
            raise ConfigError(f"This step cannot be measured: {reason}.")
        lanes = list(range(num_lanes))
        plan = StepPlan(step_id=0, decode_groups=[DecodeGroup(lanes=lanes, num_nodes=num_nodes)])
        try:
            self._prefill(lanes, self._lane_tokens(num_nodes, context_len, num_steps), context_len, params)
            self._run_steps(plan, _NUM_WARM_UP_STEPS)
            yield lambda count: self._run_steps(plan, count)
        finally:
            self._runner.submit(StepPlan(step_id=0, leaves=lanes)).result()

    def draft_seconds(self, num_lanes: int, num_nodes: int) -> float | None:
        """Seconds of drafting alone, a part of the step; None where the device side cannot tell."""
        if self._draft_timer is None or num_nodes == 1:
            return None
        return self._draft_timer(num_lanes, num_nodes)

    def _lane_tokens(self, num_nodes: int, context_len: int, num_steps: int) -> int:
        """Slots a lane may write: its context, what its steps can emit at most, and the last tree."""
        num_emitted = 1 + (num_steps + _NUM_WARM_UP_STEPS) * (min(self._max_depth, num_nodes - 1) + 1)
        return context_len + num_emitted + num_nodes

    def _lane_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _prefill(self, lanes: Sequence[int], num_tokens: int, context_len: int, params: SamplingParams) -> None:
        """Join the lanes and compute their context, as many tokens per step as the engine allows."""
        num_blocks = self._lane_blocks(num_tokens)
        joins = [self._join(lane, context_len, range(lane * num_blocks, (lane + 1) * num_blocks), params) for lane in lanes]
        for lane in lanes:
            for start in range(0, context_len, self._max_step_tokens):
                size = min(self._max_step_tokens, context_len - start)
                chunk = PrefillChunk(lane=lane, start=start, num_tokens=size, is_last=start + size == context_len)
                self._runner.submit(StepPlan(step_id=0, joins=joins, chunks=[chunk])).result()
                joins = []

    def _join(self, lane: int, context_len: int, block_ids: Sequence[int], params: SamplingParams) -> LaneJoin:
        self._next_uid += 1
        return LaneJoin(
            lane=lane,
            uid=self._next_uid,
            token_ids=[self._random.randrange(self._vocab_size) for _ in range(context_len)],
            num_prompt_tokens=context_len,
            num_computed_tokens=0,
            max_total_tokens=self._max_model_len,
            noise_key=self._random.getrandbits(64),
            params=params,
            block_ids=list(block_ids),
        )

    def _run_steps(self, plan: StepPlan, num_steps: int) -> list[float]:
        """Seconds between results, one value per step."""
        seconds: list[float] = []
        last_s = self._clock()
        pending: PendingStep = self._runner.submit(plan)
        for number in range(num_steps):
            following = self._runner.submit(plan) if number + 1 < num_steps else None
            pending.result()
            now_s = self._clock()
            seconds.append(now_s - last_s)
            last_s = now_s
            if following is not None:
                pending = following
        return seconds
