"""Token deltas of an engine to text of choices. The one place where text, token counts, usage and metrics are trimmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from medusa_core.engine.client import EngineClient
from medusa_core.errors import CapacityError, EngineError, RequestError
from medusa_core.outputs import FinishReason, TokenDelta
from medusa_core.text import OutputText
from server.convert import Job
from server.metrics import EngineMetrics
from server.protocol.common import PromptTokensDetails, Usage

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChoiceUpdate:
    """New text of one choice. index: prompt index * n + choice index. finish_reason: set in the choice's last update."""

    index: int
    text: str
    finish_reason: str | None


@dataclass(slots=True)
class _Choice:
    """is_open: more text may come. is_running: the engine has not ended it yet."""

    index: int
    output: OutputText
    is_open: bool = True
    is_running: bool = True
    last_delta_s: float | None = None


class Generation:
    """Runs one HTTP request on the engine. `updates` may be iterated once; `usage` is complete when it has ended."""

    def __init__(
        self, client: EngineClient, job: Job, new_output: Callable[[list[int]], OutputText], metrics: EngineMetrics
    ) -> None:
        self._client = client
        self._requests = {request.request_id: request for request in job.requests}
        self._metrics = metrics
        self._choices = {
            (request.request_id, choice_idx): _Choice(prompt_idx * job.n + choice_idx, new_output(request.prompt_token_ids))
            for prompt_idx, request in enumerate(job.requests)
            for choice_idx in range(job.n)
        }
        self._cached_tokens: dict[str, int] = {}
        self._num_completion_tokens = 0

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def usage(self) -> Usage:
        num_prompt = sum(len(request.prompt_token_ids) for request in self._requests.values())
        num_completion = self._num_completion_tokens
        details = PromptTokensDetails(sum(self._cached_tokens.values()))
        return Usage(num_prompt, num_completion, num_prompt + num_completion, details)

    async def updates(self) -> AsyncGenerator[ChoiceUpdate, None]:
        """Updates of all choices, interleaved. Closing it aborts what still runs.

        Raises what `EngineClient.generate` raises. Other choices go on when one ends at a stop string.
        """
        # Choices left open when the stream is closed from outside belong to a client that has gone.
        reason: str | None = "abort"
        try:
            async with aclosing(merge([self._client.generate(request) for request in self._requests.values()])) as deltas:
                async for delta in deltas:
                    update = await self._apply(delta)
                    if update is not None:
                        yield update
                    if self._is_done_early():
                        return
        except (RequestError, CapacityError):
            reason = None
            raise
        except EngineError:
            reason = "error"
            raise
        finally:
            self._count_unfinished(reason)

    def _is_done_early(self) -> bool:
        """All text is there but the engine still runs, past a stop string: leaving the loop aborts it."""
        choices = self._choices.values()
        return not any(choice.is_open for choice in choices) and any(choice.is_running for choice in choices)

    async def _apply(self, delta: TokenDelta) -> ChoiceUpdate | None:
        """Take one delta in; None when there is nothing to tell the client."""
        choice = self._choices[delta.request_id, delta.choice_idx]
        choice.is_running = delta.finish_reason is None
        if not choice.is_open:
            self._metrics.observe_discarded(len(delta.token_ids))
            return None
        if delta.finish_reason is FinishReason.ABORT:
            raise EngineError("The engine ended the request before it was complete.", hint="Try again.")
        text = choice.output.push(delta.token_ids, is_last=delta.finish_reason is not None)
        self._count(delta, choice, text.num_tokens)
        # A stop string wins over a length limit reached in the same step.
        reason = FinishReason.STOP if text.stopped else delta.finish_reason
        if reason is None:
            return ChoiceUpdate(choice.index, text.text, None) if text.text else None
        self._close(choice, reason.value, delta.request_id)
        if choice.is_running:
            await self._client.abort(delta.request_id, delta.choice_idx)
        return ChoiceUpdate(choice.index, text.text, reason.value)

    def _count(self, delta: TokenDelta, choice: _Choice, num_kept: int) -> None:
        now = time.monotonic()
        request = self._requests[delta.request_id]
        if choice.last_delta_s is None:
            self._metrics.observe_first_delta(ttft_s=now - request.arrival_s, queue_s=delta.queue_s)
            if delta.request_id not in self._cached_tokens:
                self._cached_tokens[delta.request_id] = delta.num_cached_tokens
                self._metrics.observe_prompt(len(request.prompt_token_ids))
        interval_s = None if choice.last_delta_s is None else now - choice.last_delta_s
        choice.last_delta_s = now
        self._num_completion_tokens += num_kept
        self._metrics.observe_delta(delta, num_kept=num_kept, interval_s=interval_s)

    def _close(self, choice: _Choice, reason: str, request_id: str) -> None:
        choice.is_open = False
        self._metrics.observe_finish(reason, e2e_s=time.monotonic() - self._requests[request_id].arrival_s)

    def _count_unfinished(self, reason: str | None) -> None:
        """reason: None for a request that never ran, which is no outcome of the engine."""
        for (request_id, _), choice in self._choices.items():
            if choice.is_open and reason is not None:
                self._close(choice, reason, request_id)


async def merge(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[T, None]:
    """Items of all streams as they come. The first stream that fails ends the rest and its error is raised.

    Closing the generator cancels the tasks that read the streams, and waits for them.
    """
    queue: asyncio.Queue[tuple[T] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(stream: AsyncIterator[T]) -> None:
        async for item in stream:
            queue.put_nowait((item,))

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, tuple):
                yield item[0]
            else:
                num_open -= 1
                item.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
