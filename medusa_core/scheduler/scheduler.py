"""The scheduler: `schedule` plans a step, `update` takes the result of an earlier one.

Every request has known tokens, and a lane's work is to compute those whose KV is missing (chunks) and then to draw more (decode
steps with a tree; plain decoding is a tree of one node). One order of requests, `rank`, decides who is admitted, who comes first in
a step, and who is preempted when blocks run out: the worst. So the best request is never preempted, and everyone becomes the best.

Results may come back while later steps are in flight. Until then a request's length is an interval: blocks are reserved for its
upper end, and results of requests that were preempted, finished or aborted meanwhile are still accounted for.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable

from medusa_core.cache.manager import Allocation, CacheManager
from medusa_core.config import SchedulerConfig
from medusa_core.errors import InvalidParameterError
from medusa_core.outputs import EngineStats, FinishReason, TokenDelta
from medusa_core.plan import BlockAppend, DecodeGroup, LaneJoin, LaneResult, PrefillChunk, StepPlan, StepResult
from medusa_core.request import EngineRequest, Request, RequestStatus
from medusa_core.scheduler.admission import Limits, check_queue, make_choices
from medusa_core.scheduler.budget import PrefillBudget
from medusa_core.scheduler.controller import TreeSizeController
from medusa_core.scheduler.in_flight import InFlightStep, InFlightSteps
from medusa_core.scheduler.lanes import LaneTable, lane_of
from medusa_core.scheduler.queue import WaitingQueue
from medusa_core.scheduler.step_counts import StepCounts
from medusa_core.tree.topology import TreeTopology

_ROOT_ONLY = TreeTopology(())
# From one step of lanes with a grammar to the next, where there are as many others. A time, as on an H200 each such step takes some
# 0.2 to 0.6 ms more, where steps take 1.1 ms as well as where they take 2.1 ms.
_PAUSE_S = 0.009


class Scheduler:
    """Policy of one engine. Not thread-safe.

    max_depth: longest path of the tree in draft nodes; 0 where nothing drafts. topology: whose nodes are credited with what they
    offered. clock: seconds, as `EngineRequest.arrival_s`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        controller: TreeSizeController,
        *,
        max_depth: int,
        max_model_len: int,
        topology: TreeTopology = _ROOT_ONLY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._cache = cache
        self._controller = controller
        self._max_depth = max_depth
        self._clock = clock
        self._limits = Limits(
            max_model_len=max_model_len,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            max_queued_requests=config.max_queued_requests,
        )
        self._uids = itertools.count()
        self._queue = WaitingQueue()
        self._lanes = LaneTable(config.max_num_seqs)
        self._in_flight = InFlightSteps()
        # Unfinished choices by request id, in choice order.
        self._open_choices: dict[str, list[Request]] = {}
        self._next_step_id = 0
        self._masked_s = -math.inf  # of the latest step with a grammar
        self._tree_size = 1
        self._counts = StepCounts(controller.sizes, topology, controller.costs)
        self._num_preemptions = 0

    @property
    def num_running(self) -> int:
        return self._lanes.num_running

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_steps_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        """True while there is something to plan, or a result to wait for."""
        return bool(self.num_running or self.num_waiting or self.num_steps_in_flight or self._lanes.has_leaves)

    def stats(self) -> EngineStats:
        """A snapshot; the time spent in steps is the caller's to add."""
        counts = self._counts
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_blocks_used=self._cache.num_used_blocks,
            num_blocks=self._cache.num_blocks,
            tree_size=self._tree_size,
            num_steps_total=counts.num_steps,
            num_preemptions_total=self._num_preemptions,
            num_prefix_query_tokens_total=self._cache.num_prefix_query_tokens,
            num_prefix_hit_tokens_total=self._cache.num_prefix_hit_tokens,
            num_steps_by_size_total=tuple(counts.num_steps_by_size),
            num_head_hits_total=tuple(counts.num_head_hits),
            num_lookup_hits_total=counts.num_lookup_hits,
            decode_cost_seconds_total=counts.decode_cost_s,
            draft_cost_seconds_total=counts.draft_cost_s,
            plain_cost_seconds_total=counts.plain_cost_s,
        )

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Its later choices are held until the first one's prompt is computed, whose full blocks they then share.

        Raises RequestError for a request that can never run, QueueFullError for one that cannot wait.
        """
        if request.request_id in self._open_choices:
            raise InvalidParameterError(f"request_id {request.request_id!r} is in use.", param="request_id")
        choices = make_choices(request, self._limits, self._uids)
        check_queue(self.num_waiting, self._lanes.num_free, len(choices), self._limits)
        self._open_choices[request.request_id] = choices
        self._queue.push(choices[0])
        for sibling in choices[1:]:
            self._queue.hold(sibling)

    def abort(self, request_id: str, choice_idx: int | None = None) -> list[TokenDelta]:
        """End one choice, or all, and return their last deltas. Blocks and lanes are free at once. Unknown ids are ignored."""
        deltas = []
        for request in list(self._open_choices.get(request_id, ())):
            if choice_idx is None or request.choice_idx == choice_idx:
                self._close(request)
                deltas.append(
                    TokenDelta(request_id=request_id, choice_idx=request.choice_idx, token_ids=[], finish_reason=FinishReason.ABORT)
                )
        return deltas

    def force_tree_size(self, size: int | None) -> None:
        """Use trees of `size` nodes from the next plan on, room permitting; None gives the choice back. Raises ConfigError."""
        self._controller.force(size)

    def schedule(self) -> StepPlan:
        """Plan the next step. A plan that is not empty counts as launched: its result is due in `update`.

        The plan is empty when there is nothing to do before a step in flight comes back.
        """
        step = InFlightStep()
        num_preemptions = self._num_preemptions
        decode_groups, block_appends = self._plan_decode(step)
        budget = PrefillBudget(self._config.max_step_tokens)
        for request in self._lanes.prefilling():
            self._plan_chunk(request, budget, step)
        # Where blocks have just run out, a newcomer (or the victim itself) would only be preempted next.
        joins = self._admit(budget, step) if self._num_preemptions == num_preemptions else []
        plan = StepPlan(
            step_id=self._next_step_id,
            leaves=self._lanes.take_leaves(),
            joins=joins,
            block_appends=block_appends,
            chunks=[chunk for _, chunk in step.chunks],
            decode_groups=decode_groups,
        )
        if not plan.is_empty:
            self._in_flight.launch(plan.step_id, step)
            if step.masked:
                self._masked_s = self._clock()
            self._next_step_id += 1
            if plan.has_rows:
                self._counts.launch(step.groups)
        return plan

    def update(self, result: StepResult) -> list[TokenDelta]:
        """Take the result of a launched step: append tokens, index computed blocks, free what has finished.

        A request preempted meanwhile still gets its tokens; those of a finished or aborted one are dropped.
        """
        step = self._in_flight.land(result.step_id)
        for request, chunk in step.chunks:
            self._confirm_chunk(request, chunk)
        for read in result.prompt_logprobs:
            request = step.requests[read.uid]
            # A prompt that is computed again, after a preemption, has some already, and its chunks may be others.
            num_there = len(request.prompt_logprobs) - read.start
            if 0 <= num_there < len(read.logprobs):
                request.prompt_logprobs += read.logprobs[num_there:]
        deltas = []
        num_lanes = num_tokens = 0
        prefilled = {request.uid for request, _ in step.chunks}
        for lane_result in result.lanes:
            request = step.requests.get(lane_result.uid) or self._in_flight.land_masked(lane_result.uid)
            is_news = bool(lane_result.token_ids) or lane_result.finish_reason is not None
            if is_news and not request.is_finished:
                deltas.append(self._take_tokens(request, lane_result))
                if lane_result.uid not in prefilled:
                    num_lanes += 1
                    num_tokens += len(lane_result.token_ids)
        self._counts.land(step.groups, num_lanes=num_lanes, num_tokens=num_tokens)
        return deltas

    def _plan_decode(self, step: InFlightStep) -> tuple[list[DecodeGroup], list[BlockAppend]]:
        """Reserve slots for one step of every decoding lane. Blocks short: first the tree shrinks, then the worst is preempted."""
        requests = [request for request in self._lanes.decoding() if not request.is_surely_finished]
        num_masked = sum(request.params.grammar is not None for request in requests)
        if num_masked > 0:
            holds_masked = self._holds_masked(num_masked, len(requests) - num_masked)
            requests = [request for request in requests if not _must_wait(request, holds_masked)]
        tree_size = self._choose_tree_size(requests)
        while not self._fits(growing := self._growing(requests, tree_size)):
            if tree_size > 1:
                tree_size = max(size for size in self._controller.sizes if size < tree_size)
            else:
                victim = self._lanes.worst()
                self._preempt(victim)
                requests = [request for request in requests if request is not victim]
        block_appends = [
            BlockAppend(lane=lane_of(request), block_ids=self._cache.extend(request, num_slots)) for request, num_slots in growing
        ]
        if requests:
            self._tree_size = tree_size
        return self._decode_groups(requests, tree_size, step), block_appends

    def _holds_masked(self, num_masked: int, num_free: int) -> bool:
        """Whether decoding requests with a grammar sit this step out.

        They wait for each other, so that their masks are made together; and leave time to the others, whose steps are slower where
        they take part. The fewer others there are, the less they wait.
        """
        if self._in_flight.has_masked:
            return True
        pause_s = _PAUSE_S * min(num_free / num_masked, 1.0)
        # With nothing in flight there is nothing to wait for.
        return len(self._in_flight) > 0 and self._clock() - self._masked_s < pause_s

    def _growing(self, requests: list[Request], tree_size: int) -> list[tuple[Request, int]]:
        """Requests whose blocks do not hold all slots that the step may write, with the number of those slots.

        The root is written at the slot of the last known token, its tree behind.
        """
        growing = []
        for request in requests:
            num_slots = request.max_known_tokens - 1 + self._size_for(request, tree_size)
            if num_slots > self._cache.num_slots(request):
                growing.append((request, num_slots))
        return growing

    def _fits(self, growing: list[tuple[Request, int]]) -> bool:
        num_missing = sum(self._cache.num_blocks_missing(request, num_slots) for request, num_slots in growing)
        return num_missing <= self._cache.num_free_blocks

    def _decode_groups(self, requests: list[Request], tree_size: int, step: InFlightStep) -> list[DecodeGroup]:
        """Lanes with a grammar come last: what the others do is under way when the runner turns to their masks."""
        lanes_by_kind: dict[tuple[bool, int], list[int]] = {}
        for request in requests:
            size = self._size_for(request, tree_size)
            lanes_by_kind.setdefault((request.params.grammar is not None, size), []).append(lane_of(request))
            step.add_draw(request, min(self._max_depth, size - 1) + 1, is_masked=request.params.grammar is not None)
        # Lanes with and without a grammar share a launch.
        step.groups = tuple(Counter(self._size_for(request, tree_size) for request in requests).items())
        return [
            DecodeGroup(lanes=lanes, num_nodes=size, has_grammar=has_grammar)
            for (has_grammar, size), lanes in sorted(lanes_by_kind.items(), key=lambda item: item[0][0])
        ]

    def _choose_tree_size(self, requests: list[Request]) -> int:
        num_drafting = sum(map(self._can_draft, requests))
        if num_drafting == 0:
            return 1
        num_missing = sum(self._lanes.prefill_target(r) - r.num_computed_tokens for r in self._lanes.prefilling())
        return self._controller.choose(
            num_drafting,
            num_plain_lanes=len(requests) - num_drafting,
            num_prefill_rows=min(num_missing, self._config.max_step_tokens),
        )

    def _can_draft(self, request: Request) -> bool:
        return self._max_depth > 0 and request.params.is_speculation_enabled

    def _size_for(self, request: Request, tree_size: int) -> int:
        """Nodes of the request's own tree in a step of `tree_size`: fewer if it asked for fewer."""
        if not self._can_draft(request):
            return 1
        most = request.params.max_nodes
        if most is None or most >= tree_size:
            return tree_size
        return max(size for size in self._controller.sizes if size <= most)

    def _preempt(self, request: Request) -> None:
        """Back to the queue without blocks. Its prompt and output will be computed again, except what is still cached."""
        self._cache.free(request)
        self._lanes.leave(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._queue.push(request)

    def _plan_chunk(self, request: Request, budget: PrefillBudget, step: InFlightStep) -> None:
        chunk = budget.next_chunk(request, self._lanes.prefill_target(request))
        if chunk is not None:
            step.add_chunk(request, chunk)
            if chunk.is_last:
                self._lanes.end_prefill(request)

    def _admit(self, budget: PrefillBudget, step: InFlightStep) -> list[LaneJoin]:
        """Give free lanes to the best waiting choices, in order: a choice that does not fit is not overtaken."""
        joins: list[LaneJoin] = []
        while self._lanes.has_free and budget.num_left > 0:
            request = self._queue.peek()
            # A preempted request's tokens are not all known before its steps in flight are back.
            if request is None or request.num_steps_in_flight > 0:
                break
            # A block for each running lane stays free, so that the newcomer is not preempted by their next step.
            num_spare = self._lanes.num_running
            allocation = self._cache.allocate(request, request.num_known_tokens, num_spare_blocks=num_spare)
            if allocation is None:
                break
            self._queue.pop()
            joins.append(self._join(request, allocation))
            self._plan_chunk(request, budget, step)
        return joins

    def _join(self, request: Request, allocation: Allocation) -> LaneJoin:
        request.num_computed_tokens = allocation.num_cached_tokens
        if request.first_scheduled_s is None:
            request.first_scheduled_s = self._clock()
            request.num_cached_tokens = allocation.num_cached_tokens
        return LaneJoin(
            lane=self._lanes.join(request),
            uid=request.uid,
            token_ids=request.known_token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=allocation.num_cached_tokens,
            max_total_tokens=request.max_total_tokens,
            noise_key=request.noise_key,
            params=request.params,
            block_ids=allocation.block_ids,
        )

    def _confirm_chunk(self, request: Request, chunk: PrefillChunk) -> None:
        """Index a computed chunk, unless the request has lost its blocks; after the last one, let its siblings share it."""
        if request.lane is None:
            return
        self._cache.commit(request, chunk.start + chunk.num_tokens)
        if chunk.is_last:
            for sibling in self._open_choices[request.request_id]:
                self._queue.release(sibling)

    def _take_tokens(self, request: Request, result: LaneResult) -> TokenDelta:
        is_first = not request.output_token_ids
        if result.credit:
            self._counts.credit(result.credit)
        request.output_token_ids += result.token_ids
        if request.lane is not None:
            self._cache.commit(request, request.num_known_tokens - 1)
        if result.finish_reason is not None:
            self._close(request)
        elif result.num_draft_nodes > 0:
            # Only steps not cut short by an end tell how good the drafts are.
            self._controller.observe(result.num_draft_nodes + 1, result.num_accepted)
        return TokenDelta(
            request_id=request.request_id,
            choice_idx=request.choice_idx,
            token_ids=result.token_ids,
            finish_reason=result.finish_reason,
            num_draft_nodes=result.num_draft_nodes,
            draft_depth=result.draft_depth,
            num_accepted=result.num_accepted,
            is_first=is_first,
            num_cached_tokens=request.num_cached_tokens if is_first else 0,
            queue_s=(request.first_scheduled_s or 0.0) - request.arrival_s if is_first else 0.0,
            logprobs=result.logprobs,
            prompt_logprobs=request.prompt_logprobs if is_first else [],
        )

    def _close(self, request: Request) -> None:
        """End a choice wherever it is: running, waiting or held."""
        if request.lane is not None:
            self._cache.free(request)
            self._lanes.leave(request)
        else:
            self._queue.remove(request)
        request.status = RequestStatus.FINISHED
        choices = self._open_choices[request.request_id]
        choices.remove(request)
        if not choices:
            del self._open_choices[request.request_id]
        elif all(self._queue.is_held(choice) for choice in choices):
            # The choice whose prompt they waited for is gone: the next one computes it.
            self._queue.release(choices[0])


def _must_wait(request: Request, holds_masked: bool) -> bool:
    """What a grammar allows next is known only when all tokens are. holds_masked: nobody with a grammar takes part."""
    return request.params.grammar is not None and (holds_masked or request.num_draws_in_flight > 0)
