"""The engine itself: schedule a step, run it, update the requests. Synchronous, single-threaded, tokens only."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from typing import Literal, Protocol

import msgspec

from medusa_core.errors import EngineError, InvalidParameterError, PromptError
from medusa_core.grammar.compiler import GrammarCompiler
from medusa_core.outputs import STEP_LATENCY_BOUNDS_S, EngineInfo, EngineStats, TokenDelta
from medusa_core.params import MAX_STOP_TOKEN_IDS
from medusa_core.plan import PendingStep, Runner, StepPlan, StepResult
from medusa_core.request import EngineRequest


class Scheduler(Protocol):
    """The policy side, as the core drives it (scheduler.Scheduler)."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError or CapacityError, and then keeps nothing of it."""
        ...

    def schedule(self) -> StepPlan: ...

    def update(self, result: StepResult) -> list[TokenDelta]: ...

    def abort(self, request_id: str, choice_idx: int | None) -> list[TokenDelta]: ...

    def stats(self) -> EngineStats: ...

    def force_tree_size(self, size: int | None) -> None:
        """Use trees of `size` nodes from the next plan on; None gives the choice back. Raises ConfigError."""
        ...


class EngineCore:
    """A scheduler and a runner, stepped by whoever owns the thread.

    max_steps_in_flight: steps launched before the oldest one's result is read; 0 waits for each step. grammars: what the runner
    compiles grammars with, so that one it could not use never gets there.

    num_starts: as EngineStats; for its owner to set.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, info: EngineInfo, *, max_steps_in_flight: int, grammars: GrammarCompiler
    ) -> None:
        self.info = info
        self._grammars = grammars
        self._scheduler = scheduler
        self._runner = runner
        self._max_steps_in_flight = max_steps_in_flight
        # and whether they have rows, as lane changes alone are no step to those who count
        self._pending: deque[tuple[PendingStep, bool]] = deque()
        self.num_starts = 1
        self._step_seconds = 0.0
        self._num_steps_by_latency = [0] * (len(STEP_LATENCY_BOUNDS_S) + 1)
        # when the oldest step in flight was launched, or the result before it came
        self._since_s = 0.0

    @property
    def runner(self) -> Runner:
        """The device side, for those who measure it."""
        return self._runner

    @property
    def has_work(self) -> bool:
        """True while `step` can achieve something; a caller may block for commands while it is False."""
        return self._scheduler.has_work or bool(self._pending)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError if it is wrong, CapacityError if there is no room for it now."""
        _check_token_ids(request, self.info.vocab_size, self.info.max_model_len)
        if request.params.grammar is not None:
            self._grammars.compile(request.params.grammar)
        self._scheduler.add(request)

    def abort(self, request_id: str, choice_idx: int | None = None) -> list[TokenDelta]:
        """End one choice, or all; returns their last deltas. Unknown ids and ended choices are ignored."""
        return self._scheduler.abort(request_id, choice_idx)

    def set_tree_size(self, size: int | Literal["auto"]) -> None:
        """Nodes per tree from the next plan on, root included: 1 is plain decoding, "auto" the rule the engine was configured with.

        Rows beyond `max_step_rows` still shrink the tree. Raises ConfigError, naming the sizes there are, for any other size.
        """
        self._scheduler.force_tree_size(None if size == "auto" else size)

    def step(self) -> list[TokenDelta]:
        """Launch the next step and return what the oldest finished one emitted, which is nothing while the pipeline fills."""
        if not self._pending:
            self._since_s = time.perf_counter()
        plan = self._scheduler.schedule()
        self._launch(plan)
        return self._collect(is_starved=not plan.has_rows)

    def stats(self) -> EngineStats:
        """The scheduler's snapshot, with what is known here."""
        return msgspec.structs.replace(
            self._scheduler.stats(),
            step_seconds_total=self._step_seconds,
            num_starts=self.num_starts,
            num_steps_by_latency_total=tuple(self._num_steps_by_latency),
        )

    def _launch(self, plan: StepPlan) -> None:
        if not plan.is_empty:
            self._pending.append((self._runner.submit(plan), plan.has_rows))
        elif not self._pending and self._scheduler.has_work:
            # Nothing runs and nothing will change by itself: better a loud end than a loop that spins for ever.
            raise EngineError("The scheduler has requests but plans no step for them.")

    def _collect(self, *, is_starved: bool) -> list[TokenDelta]:
        """Update from the oldest step if too many are in flight, or if no rows were left to launch behind it."""
        if self._pending and (is_starved or len(self._pending) > self._max_steps_in_flight):
            pending, has_rows = self._pending.popleft()
            result = pending.result()
            if has_rows:
                self._time_step()
            return self._scheduler.update(result)
        return []

    def _time_step(self) -> None:
        now_s = time.perf_counter()
        seconds, self._since_s = now_s - self._since_s, now_s
        self._step_seconds += seconds
        self._num_steps_by_latency[bisect_left(STEP_LATENCY_BOUNDS_S, seconds)] += 1


def _check_token_ids(request: EngineRequest, vocab_size: int, max_model_len: int) -> None:
    prompt = request.prompt_token_ids
    if not prompt:
        raise PromptError("The prompt is empty.", param="prompt", hint="Send at least one token.")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        idx = next(idx for idx, token_id in enumerate(prompt) if not 0 <= token_id < vocab_size)
        raise PromptError(
            f"Prompt token {idx} is {prompt[idx]}, outside the vocabulary.", param="prompt", hint=f"Use ids 0..{vocab_size - 1}."
        )
    num_stop_ids = len(request.params.stop_token_ids)
    if num_stop_ids > MAX_STOP_TOKEN_IDS:
        raise InvalidParameterError(
            f"stop_token_ids holds {num_stop_ids} ids, at most {MAX_STOP_TOKEN_IDS} are allowed.", param="stop_token_ids"
        )
    if len(request.params.prediction) > max_model_len:
        raise InvalidParameterError(
            f"prediction holds {len(request.params.prediction)} tokens, more than the context of {max_model_len}.",
            param="prediction",
        )
    biased_ids = [token_id for token_id, _ in request.params.logit_bias]
    for field, token_ids in (
        ("stop_token_ids", request.params.stop_token_ids),
        ("logit_bias", biased_ids),
        ("prediction", request.params.prediction),
    ):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidParameterError(
                    f"{field} holds {token_id}, outside the vocabulary.", param=field, hint=f"Use ids 0..{vocab_size - 1}."
                )
