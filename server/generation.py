"""Token deltas of an engine to text of choices. The one place where text, token counts, usage and metrics are trimmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from medusa_core.engine.client import EngineClient
from medusa_core.errors import CapacityError, EngineError, InvalidParameterError, MedusaError, RequestError
from medusa_core.outputs import FinishReason, TokenDelta, TokenLogprob
from medusa_core.request import EngineRequest
from medusa_core.text import OutputText
from medusa_core.text.tool_calls import CallEvent
from server.convert import Job
from server.metrics import GenerationMetrics
from server.prediction import PredictionCount
from server.protocol.common import CompletionTokensDetails, PromptTokensDetails, RequestMetrics, Usage
from server.record import RequestRecord, Work


# A struct, as there is one per frame: a frozen dataclass takes five times as long to make.
class ChoiceUpdate(msgspec.Struct, frozen=True):
    """What is new in one choice. index: prompt index * n + choice index. finish_reason: set in the choice's last update. token_ids,
    logprobs: of this and of what was held back before, as far as they count; empty unless asked for. prompt_logprobs: in the
    choice's first update, of each prompt token but the first; empty unless asked for. calls: tool calls, no part of text."""

    index: int
    text: str
    finish_reason: str | None
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    calls: Sequence[CallEvent] = ()


Updates: TypeAlias = AsyncGenerator[list[ChoiceUpdate], None]


@dataclass(slots=True)
class _Choice:
    """idx: among the request's choices. is_open: more text may come. is_running: the engine has not ended it yet."""

    request: EngineRequest
    idx: int
    index: int
    output: OutputText
    prediction: PredictionCount | None
    record: RequestRecord
    finish_reason: str | None = None
    is_open: bool = True
    is_running: bool = True
    last_delta_s: float | None = None
    # not told yet
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


def _failure_of(request: EngineRequest, reason: FinishReason) -> MedusaError:
    """What a request ends with that the engine has ended."""
    if reason is FinishReason.ABORT or request.params.grammar is None:
        return EngineError("The engine ended the request before it was complete.", hint="Try again.")
    field = request.params.grammar.field
    return InvalidParameterError(
        f"{field} takes more than is allowed to follow along the output.",
        param=field,
        hint="Simplify it: fewer alternatives, optional properties or repetitions.",
    )


class Generation:
    """Runs one HTTP request on the engine. `updates` may be iterated once; `usage` and `request_metrics` are complete when it has
    ended."""

    def __init__(
        self,
        client: EngineClient,
        job: Job,
        new_output: Callable[[list[int]], OutputText],
        metrics: GenerationMetrics,
        *,
        max_depth: int,
        has_token_ids: bool = False,
    ) -> None:
        self._client = client
        self._requests = job.requests
        self._metrics = metrics
        self._choices = {
            (request.request_id, idx): _Choice(
                request,
                idx,
                prompt_idx * job.n + idx,
                new_output(request.prompt_token_ids),
                PredictionCount(request.params.prediction) if request.params.prediction else None,
                RequestRecord(arrival_s=request.arrival_s, max_depth=max_depth),
            )
            for prompt_idx, request in enumerate(job.requests)
            for idx in range(job.n)
        }
        self._num_open = len(self._choices)
        self._has_token_ids = has_token_ids
        self._cached_tokens: dict[str, int] = {}
        self._num_completion_tokens = 0
        # Choices whose text has ended while the engine goes on.
        self._stopped: list[_Choice] = []
        # what the engine ended the request with before it was complete
        self._failure: MedusaError | None = None
        self._has_left = False
        # of what a stream ended with, whose status had been sent
        self.error_code: str | None = None

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return [request.prompt_token_ids for request in self._requests]

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def is_open(self) -> bool:
        """More text may come. Once it is False, `updates` ends without waiting for anything."""
        return self._num_open > 0

    @property
    def usage(self) -> Usage:
        num_prompt = sum(len(request.prompt_token_ids) for request in self._requests)
        num_completion = self._num_completion_tokens
        predictions = [choice.prediction for choice in self._choices.values() if choice.prediction is not None]
        details = PromptTokensDetails(sum(self._cached_tokens.values()))
        usage = Usage(num_prompt, num_completion, num_prompt + num_completion, details)
        if predictions:
            usage.completion_tokens_details = CompletionTokensDetails(
                sum(prediction.num_accepted for prediction in predictions),
                sum(prediction.num_rejected for prediction in predictions),
            )
        return usage

    @property
    def request_metrics(self) -> RequestMetrics | None:
        """None for several choices."""
        if len(self._choices) > 1:
            return None
        (choice,) = self._choices.values()
        return choice.record.metrics

    @property
    def num_charged_tokens(self) -> int:
        """Of prompts that the engine has computed, and of completions. A client that leaves before the first token pays for its
        prompts: they may have been computed, and leaving would be the way around a limit."""
        charged = [request for request in self._requests if self._has_left or request.request_id in self._cached_tokens]
        return sum(len(request.prompt_token_ids) for request in charged) + self._num_completion_tokens

    @property
    def finish_reasons(self) -> list[str | None]:
        """Of each choice, in the order of their indices: as clients are told, or abort or error; None while it is open."""
        return [choice.finish_reason for choice in sorted(self._choices.values(), key=lambda choice: choice.index)]

    @property
    def work(self) -> Work:
        """What the engine has done for all choices together."""
        return Work.of([choice.record for choice in self._choices.values()])

    async def updates(self) -> Updates:
        """Updates of all choices, interleaved: each item holds what is new since the one before, at most one update per choice.

        Closing it aborts what still runs. Raises what `EngineClient.generate_many` raises. Other choices go on when one ends at a
        stop string.
        """
        reason: str | None = "error"
        try:
            async with aclosing(self._client.generate_many(self._requests)) as batches:
                async for batch in batches:
                    updates = self._take(batch)
                    if self._stopped:
                        await self._abort_stopped()
                    if updates:
                        yield updates
                    if self._failure is not None:
                        raise self._failure
                    # All text is there but the engine still runs, past a stop string: leaving the loop aborts it.
                    if not self.is_open and any(choice.is_running for choice in self._choices.values()):
                        return
        except (RequestError, CapacityError):
            reason = None
            raise
        except (GeneratorExit, asyncio.CancelledError):
            # Closed from outside: the client has gone, or what is made of the updates has failed.
            if self.error_code is None:
                reason, self._has_left = "abort", True
            raise
        finally:
            self._count_unfinished(reason)

    def _take(self, batch: list[TokenDelta]) -> list[ChoiceUpdate]:
        """Take deltas in. Those of one choice make one update, or none when there is nothing to tell the client."""
        by_choice: dict[tuple[str, int], list[TokenDelta]] = {}
        for delta in batch:
            by_choice.setdefault((delta.request_id, delta.choice_idx), []).append(delta)
        updates: list[ChoiceUpdate] = []
        for key, deltas in by_choice.items():
            update = self._take_choice(self._choices[key], deltas)
            if update is not None:
                updates.append(update)
        return updates

    def _take_choice(self, choice: _Choice, deltas: list[TokenDelta]) -> ChoiceUpdate | None:
        now = time.monotonic()
        text, num_timed, reason = "", 0, None
        calls: list[CallEvent] = []
        for delta in deltas:
            choice.is_running = delta.finish_reason is None
            if not choice.is_open:
                self._metrics.observe_discarded(len(delta.token_ids))
                continue
            if delta.finish_reason in (FinishReason.ABORT, FinishReason.GRAMMAR):
                self._failure = _failure_of(choice.request, delta.finish_reason)
                continue
            added = choice.output.push(delta.token_ids, is_last=delta.finish_reason is not None)
            text += added.text
            calls += added.calls
            self._num_completion_tokens += added.num_tokens
            if choice.prediction is not None:
                choice.prediction.add(delta.token_ids[: added.num_tokens])
            self._metrics.observe_delta(delta, num_kept=added.num_tokens)
            if self._has_token_ids:
                choice.token_ids += delta.token_ids[: added.num_tokens]
                choice.logprobs += delta.logprobs[: added.num_tokens]
                choice.prompt_logprobs += delta.prompt_logprobs
            choice.record.add(delta, num_kept=added.num_tokens, now_s=now)
            if choice.last_delta_s is None:
                self._observe_first(choice, delta, now)
            else:
                num_timed += added.num_tokens
            # A stop string wins over a length limit reached in the same step.
            reason = FinishReason.STOP if added.stopped else delta.finish_reason
            choice.is_open = reason is None
        if choice.last_delta_s is not None:
            self._metrics.observe_interval(now - choice.last_delta_s, num_tokens=num_timed)
            choice.last_delta_s = now
        if reason is None and not text and not calls:
            return None
        if reason is not None:
            self._close(choice, reason.value)
            if choice.is_running:
                self._stopped.append(choice)
        return self._update(choice, text, calls, reason)

    def _update(self, choice: _Choice, text: str, calls: list[CallEvent], reason: FinishReason | None) -> ChoiceUpdate:
        """With all that was not told yet."""
        token_ids, choice.token_ids = choice.token_ids, []
        logprobs, choice.logprobs = choice.logprobs, []
        prompt_logprobs, choice.prompt_logprobs = choice.prompt_logprobs, []
        name = reason and reason.value
        if reason is FinishReason.STOP and choice.output.has_calls:
            name = choice.finish_reason = "tool_calls"
        return ChoiceUpdate(choice.index, text, name, token_ids, logprobs, prompt_logprobs, calls)

    async def _abort_stopped(self) -> None:
        """The engine does not know that a stop string has ended these choices."""
        while self._stopped:
            choice = self._stopped.pop()
            await self._client.abort(choice.request.request_id, choice.idx)

    def _observe_first(self, choice: _Choice, delta: TokenDelta, now: float) -> None:
        request = choice.request
        choice.last_delta_s = now
        self._metrics.observe_first_delta(ttft_s=now - request.arrival_s, queue_s=delta.queue_s)
        if request.request_id not in self._cached_tokens:
            self._cached_tokens[request.request_id] = delta.num_cached_tokens
            self._metrics.observe_prompt(len(request.prompt_token_ids), num_cached=delta.num_cached_tokens)

    def _close(self, choice: _Choice, reason: str) -> None:
        choice.is_open = False
        choice.finish_reason = reason
        self._num_open -= 1
        record = choice.record
        self._metrics.observe_finish(
            reason,
            num_tokens=record.num_tokens,
            decode_s=record.last_s - record.first_s,
            e2e_s=time.monotonic() - record.arrival_s,
        )

    def _count_unfinished(self, reason: str | None) -> None:
        """reason: None for a request that was refused. Choices that never ran are then no outcome of the engine; those that did run
        ended with what others of the request were refused for, or with a grammar that takes too much to follow."""
        for choice in self._choices.values():
            if choice.is_open and (reason is not None or choice.last_delta_s is not None):
                self._close(choice, reason or "error")
