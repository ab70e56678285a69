"""A scheduler and a runner without a model: each choice repeats its prompt, one token a step.

`build` reads its behaviour from `config.model.model`, words separated by blanks:
    delay=0.01   seconds per step
    refuse       raise HeadsMismatchError while loading
    crash        end the process while loading, without a word
    bug          raise TypeError while loading
    slow_load    take for ever to load
A prompt that starts with POISON_TOKEN makes the step that runs it fail.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from medusa_core.config import EngineConfig
from medusa_core.engine.core import EngineCore
from medusa_core.errors import HeadsMismatchError, QueueFullError
from medusa_core.outputs import EngineInfo, EngineStats, FinishReason, TokenDelta
from medusa_core.plan import DecodeGroup, LaneResult, StepPlan, StepResult
from medusa_core.request import EngineRequest
from tests.grammars import no_compiler

VOCAB_SIZE = 1000
POISON_TOKEN = 666

INFO = EngineInfo(
    model_name="fake",
    tokenizer_path="",
    dtype="float32",
    device="cpu",
    max_model_len=10_000,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=[0],
    num_blocks=100,
    block_size=16,
    max_num_seqs=64,
)


@dataclass
class Choice:
    request: EngineRequest
    idx: int
    num_emitted: int = 0
    num_planned: int = 0
    is_finished: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.idx

    def next_token(self, position: int) -> int:
        """Choice i repeats the prompt shifted by i."""
        prompt = self.request.prompt_token_ids
        return prompt[(position + self.idx) % len(prompt)]


@dataclass
class FakeRunner:
    """Runs a plan when its result is read. `plans` records what was submitted."""

    delay_s: float = 0.0
    choices: dict[int, Choice] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    def submit(self, plan: StepPlan) -> FakeStep:
        self.plans.append(plan)
        return FakeStep(self, plan)


@dataclass
class FakeStep:
    runner: FakeRunner
    plan: StepPlan

    def result(self) -> StepResult:
        time.sleep(self.runner.delay_s)
        lanes = []
        for lane in (lane for group in self.plan.decode_groups for lane in group.lanes):
            choice = self.runner.choices[lane]
            token_id = choice.next_token(choice.num_emitted)
            if choice.request.prompt_token_ids[0] == POISON_TOKEN:
                raise RuntimeError("poisoned")
            is_last = choice.num_emitted + 1 == choice.request.params.max_tokens
            reason = FinishReason.LENGTH if is_last else None
            lanes.append(LaneResult(lane=lane, uid=lane, token_ids=[token_id], finish_reason=reason))
        return StepResult(step_id=self.plan.step_id, lanes=lanes)


class FakeScheduler:
    """One block per open choice; a lane number is a choice's number for life."""

    def __init__(self, runner: FakeRunner, *, max_choices: int = 64) -> None:
        self.open: dict[int, Choice] = {}
        self._runner = runner
        self._max_choices = max_choices
        self._num_choices = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def add(self, request: EngineRequest) -> None:
        if len(self.open) + request.params.n > self._max_choices:
            raise QueueFullError("The queue is full.", hint="Try again later.")
        for idx in range(request.params.n):
            self.open[self._num_choices] = self._runner.choices[self._num_choices] = Choice(request, idx)
            self._num_choices += 1

    def schedule(self) -> StepPlan:
        lanes = [lane for lane, choice in self.open.items() if choice.num_planned != choice.request.params.max_tokens]
        for lane in lanes:
            self.open[lane].num_planned += 1
        self._num_steps += bool(lanes)
        return StepPlan(step_id=self._num_steps, decode_groups=[DecodeGroup(lanes=lanes, num_nodes=1)] if lanes else [])

    def update(self, result: StepResult) -> list[TokenDelta]:
        deltas = []
        for lane in result.lanes:
            choice = self.open.get(lane.lane)
            if choice is None:
                continue  # aborted while its step was in flight
            deltas.append(_delta(choice, lane.token_ids, lane.finish_reason))
            choice.num_emitted += 1
            if lane.finish_reason is not None:
                del self.open[lane.lane]
        return deltas

    def abort(self, request_id: str, choice_idx: int | None) -> list[TokenDelta]:
        lanes = [
            lane
            for lane, choice in self.open.items()
            if choice.request.request_id == request_id and choice_idx in (None, choice.idx)
        ]
        return [_delta(self.open.pop(lane), [], FinishReason.ABORT) for lane in lanes]

    def stats(self) -> EngineStats:
        num_open = len(self.open)
        return EngineStats(num_running=num_open, num_blocks_used=num_open, num_blocks=100, num_steps_total=self._num_steps)


def _delta(choice: Choice, token_ids: list[int], reason: FinishReason | None) -> TokenDelta:
    return TokenDelta(
        request_id=choice.request.request_id,
        choice_idx=choice.idx,
        token_ids=token_ids,
        finish_reason=reason,
        is_first=choice.num_emitted == 0,
    )


def build(config: EngineConfig, *, progress: bool) -> EngineCore:
    words = (config.model.model or "").split()
    options = dict(word.partition("=")[::2] for word in words)
    if "refuse" in options:
        raise HeadsMismatchError("The heads are for another model.", hint="Use the right ones.")
    if "crash" in options:
        os._exit(3)
    if "bug" in options:
        raise TypeError("a bug in the loader")
    if "slow_load" in options:
        time.sleep(60)
    print("a library", "that prints", "must not disturb the start")
    runner = FakeRunner(delay_s=float(options.get("delay", 0)))
    scheduler = FakeScheduler(runner, max_choices=config.scheduler.max_queued_requests)
    in_flight = config.scheduler.max_steps_in_flight or 0
    return EngineCore(scheduler, runner, INFO, max_steps_in_flight=in_flight, grammars=no_compiler())
