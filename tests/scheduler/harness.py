"""Drives a scheduler and a fake runner as the engine does, and keeps what callers would see."""

import random
from collections import deque

from medusa_core.cache.manager import CacheManager
from medusa_core.config import SchedulerConfig
from medusa_core.outputs import FinishReason
from medusa_core.params import SamplingParams
from medusa_core.plan import StepResult
from medusa_core.request import EngineRequest
from medusa_core.scheduler.controller import FixedTreeSize
from medusa_core.scheduler.noise import noise_key
from medusa_core.scheduler.scheduler import Scheduler
from medusa_core.tree.topology import TreeTopology
from tests.scheduler.fake_runner import FakeRunner, plain_output


class Harness:
    def __init__(
        self,
        *,
        num_blocks=32,
        block_size=4,
        max_model_len=64,
        tree_size=8,
        max_depth=3,
        enable_prefix_cache=True,
        controller=None,
        topology=None,
        seed=0,
        has_late_results=False,
        step_s=1.0,
        **config,
    ):
        options = {"max_num_seqs": 4, "max_step_tokens": 8, "max_step_rows": 64} | config
        self.config = SchedulerConfig(**options)
        self.cache = CacheManager(num_blocks=num_blocks, block_size=block_size, enable_prefix_cache=enable_prefix_cache)
        self.controller = controller or FixedTreeSize(tree_size, max_step_rows=self.config.max_step_rows)
        self.now_s = 5.0
        self.step_s = step_s
        self.scheduler = Scheduler(
            self.config,
            self.cache,
            self.controller,
            max_depth=max_depth,
            max_model_len=max_model_len,
            topology=topology or TreeTopology.chain(max_depth),
            clock=lambda: self.now_s,
        )
        self.runner = FakeRunner(num_blocks=num_blocks, block_size=block_size, max_depth=max_depth, seed=seed)
        self.max_model_len = max_model_len
        # results that were not read, each with the lanes that may come later; and lane results that do
        self.pending = deque()
        self.late = []
        self.has_late_results = has_late_results
        self.rng = random.Random(seed)
        self.requests = {}
        self.deltas = {}

    def add(self, prompt, *, request_id=None, priority=0, arrival_s=1.0, **params):
        request_id = request_id or f"r{len(self.requests)}"
        params = SamplingParams(**({"max_tokens": 6, "seed": 1} | params))
        request = EngineRequest(
            request_id=request_id, prompt_token_ids=list(prompt), params=params, priority=priority, arrival_s=arrival_s
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        for choice_idx in range(params.n):
            self.deltas[request_id, choice_idx] = []
        return request_id

    def abort(self, request_id, choice_idx=None):
        self._take(self.scheduler.abort(request_id, choice_idx))

    def step(self):
        """Plan and launch a step, then read results until no more than allowed are in flight. Returns the plan."""
        num_preemptions = self.scheduler.stats().num_preemptions_total
        plan = self.scheduler.schedule()
        self.now_s += self.step_s
        self._check(plan)
        if self.scheduler.stats().num_preemptions_total > num_preemptions:
            assert plan.joins == [], "admits in the step that ran out of blocks"
        if plan.is_empty:
            assert self.pending or not self.scheduler.has_work, "work, nothing in flight, and nothing planned"
        else:
            masked = {lane for group in plan.decode_groups if group.has_grammar for lane in group.lanes}
            self.pending.append((self.runner.submit(plan), masked))
        allowed = 0 if plan.is_empty else self.config.max_steps_in_flight or 0
        while len(self.pending) > allowed:
            self._take(self.scheduler.update(self._read()))
        return plan

    def _read(self):
        """The oldest result. Lanes with a grammar may come with a later one, but no later than with the latest."""
        result, masked = self.pending.popleft()
        if not self.has_late_results:
            return result
        self.late += [lane for lane in result.lanes if lane.lane in masked]
        lanes = [lane for lane in result.lanes if lane.lane not in masked]
        if not self.pending or self.rng.random() < 0.3:
            lanes, self.late = lanes + self.late, []
        return StepResult(step_id=result.step_id, lanes=lanes, prompt_logprobs=result.prompt_logprobs)

    def run(self, max_steps=2000):
        """Steps until there is no work; starvation fails."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps")

    def tokens(self, request_id, choice_idx=0):
        return [token for delta in self.deltas[request_id, choice_idx] for token in delta.token_ids]

    def reason(self, request_id, choice_idx=0):
        deltas = self.deltas[request_id, choice_idx]
        assert all(delta.finish_reason is None for delta in deltas[:-1]), "a delta after the last one"
        return deltas[-1].finish_reason if deltas else None

    def expected(self, request_id, choice_idx=0):
        request = self.requests[request_id]
        num_prompt = len(request.prompt_token_ids)
        limit = min(self.max_model_len, self.cache.num_blocks * self.cache.block_size)
        max_total = limit if request.params.max_tokens is None else num_prompt + request.params.max_tokens
        return plain_output(request.prompt_token_ids, noise_key(request.params.seed, choice_idx), request.params, max_total)

    def assert_all_as_expected(self):
        """Every choice ended with its plain output, or a prefix of it where aborted; and nothing is held any more."""
        for request_id, choice_idx in self.deltas:
            tokens, reason = self.expected(request_id, choice_idx)
            if self.reason(request_id, choice_idx) is FinishReason.ABORT:
                assert self.tokens(request_id, choice_idx) == tokens[: len(self.tokens(request_id, choice_idx))]
            else:
                assert (self.tokens(request_id, choice_idx), self.reason(request_id, choice_idx)) == (tokens, reason)
        self.assert_idle()

    def assert_idle(self):
        assert not self.scheduler.has_work
        assert self.cache.num_free_blocks == self.cache.num_blocks
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.runner.lanes == {}

    def _check(self, plan):
        num_rows = sum(len(group.lanes) * group.num_nodes for group in plan.decode_groups)
        assert num_rows <= self.config.max_step_rows
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= self.config.max_step_tokens
        assert self.scheduler.num_running <= self.config.max_num_seqs
        # results that have not been read may hold tokens, which a grammar must have seen
        unseen = {lane.uid for result, _ in self.pending for lane in result.lanes} | {lane.uid for lane in self.late}
        for group in plan.decode_groups:
            for lane in group.lanes:
                join = self.runner.lanes[lane].join
                assert group.has_grammar == (join.params.grammar is not None)
                assert not (group.has_grammar and join.uid in unseen)

    def _take(self, deltas):
        for delta in deltas:
            self.deltas[delta.request_id, delta.choice_idx].append(delta)
