"""From what a caller submits to choices that can wait for a lane, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from medusa_core.errors import ContextLengthError, InvalidParameterError, PromptError, QueueFullError
from medusa_core.outputs import TokenLogprob
from medusa_core.request import EngineRequest, Request
from medusa_core.scheduler.noise import noise_key


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request must fit. max_model_len: tokens of prompt and output. num_blocks, block_size: the whole KV cache."""

    max_model_len: int
    num_blocks: int
    block_size: int
    max_queued_requests: int

    @property
    def max_total_tokens(self) -> int:
        """Most tokens that a request alone on this engine can reach."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


def make_choices(request: EngineRequest, limits: Limits, uids: Iterator[int]) -> list[Request]:
    """The n choices of a request. Raises RequestError for a request that can never run."""
    max_total_tokens = _max_total_tokens(request, limits)
    if request.params.n > limits.max_queued_requests:
        raise InvalidParameterError(
            f"n must be at most {limits.max_queued_requests}, the length of the queue, got {request.params.n}.", param="n"
        )
    # the first choice computes the prompt for all
    later_params = replace(request.params, num_prompt_logprobs=None)
    prompt_logprobs: list[TokenLogprob] = []
    return [
        Request(
            uid=next(uids),
            request_id=request.request_id,
            choice_idx=choice_idx,
            prompt_token_ids=request.prompt_token_ids,
            params=later_params if choice_idx else request.params,
            noise_key=noise_key(request.params.seed, choice_idx),
            max_total_tokens=max_total_tokens,
            priority=request.priority,
            arrival_s=request.arrival_s,
            cache_salt=request.cache_salt,
            prompt_logprobs=prompt_logprobs,
        )
        for choice_idx in range(request.params.n)
    ]


def check_queue(num_waiting: int, num_free_lanes: int, num_choices: int, limits: Limits) -> None:
    """Raises QueueFullError when the choices do not fit the queue now.

    Choices that free lanes can take do not count: they are only waiting for the next step, however many arrived since the last.
    """
    if num_waiting + num_choices > limits.max_queued_requests + num_free_lanes:
        raise QueueFullError(
            f"The queue is full: {num_waiting} choices wait, {num_choices} more would exceed the limit of "
            f"{limits.max_queued_requests} (max_queued_requests).",
            hint="Try again later.",
        )


def _max_total_tokens(request: EngineRequest, limits: Limits) -> int:
    """Tokens at which the choices end. Without `max_tokens`, as many as fit."""
    num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    if num_prompt == 0:
        raise PromptError("The prompt is empty.", param="prompt", hint="Send at least one token.")
    # Unless none is wanted, one token of output must fit.
    num_needed = num_prompt + (1 if max_tokens is None else max_tokens)
    parts = f"{num_prompt} of the prompt and {'at least 1' if max_tokens is None else max_tokens} of output"
    param = "prompt" if max_tokens is None or num_prompt >= limits.max_total_tokens else "max_tokens"
    if num_needed > limits.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {limits.max_model_len} tokens, but the request needs {num_needed}: {parts}.",
            param=param,
            hint="Shorten the prompt or lower max_tokens.",
        )
    if num_needed > limits.max_total_tokens:
        raise ContextLengthError(
            f"The KV cache holds {limits.num_blocks} blocks x {limits.block_size} = {limits.max_total_tokens} tokens, but the "
            f"request needs {num_needed}: {parts}.",
            param=param,
            hint="Shorten the prompt, lower max_tokens, or start the server with a larger cache.",
        )
    return limits.max_total_tokens if max_tokens is None else num_needed
