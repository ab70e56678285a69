"""What a caller submits (`EngineRequest`) and what the policy side keeps per choice (`Request`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec

from medusa_core.outputs import TokenLogprob
from medusa_core.params import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as callers submit it, in tokens.

    request_id: unique among live requests of this caller.
    priority: lower runs first; equal priorities run in order of arrival.
    arrival_s: `time.monotonic()` when the server received it (one clock for all processes of a machine).
    cache_salt: prompts share the prefix cache only with those of the same salt.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str = ""


class RequestStatus(enum.Enum):
    """WAITING covers new, preempted and sibling choices alike: all of them wait for a lane."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One choice of a request, as the scheduler sees it. Identity is object identity; `uid` names it in plans and results.

    Known tokens are prompt + output. While steps are in flight the true length lies in [num_known_tokens, max_known_tokens]; both
    are equal when no step is in flight.
    """

    uid: int
    request_id: str
    choice_idx: int
    prompt_token_ids: list[int]
    params: SamplingParams
    noise_key: int
    # min(prompt + max_tokens, max_model_len): the device stops the lane here with finish reason "length"
    max_total_tokens: int
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str = ""
    status: RequestStatus = RequestStatus.WAITING
    lane: int | None = None
    # confirmed tokens only, in order
    output_token_ids: list[int] = field(default_factory=list)
    # of the prompt's second token and those behind it, as far as they have come back; one list for all choices of a request
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    # prompt (and, on resume, output) tokens whose KV is cached or has been planned; exact, unlike the decode length
    num_computed_tokens: int = 0
    # tokens taken from the prefix index at the first admission, for usage.prompt_tokens_details
    num_cached_tokens: int = 0
    # plans that include this request's lane and whose result has not been seen; how many of them draw tokens, and how many at most
    num_steps_in_flight: int = 0
    num_draws_in_flight: int = 0
    max_tokens_in_flight: int = 0
    num_preemptions: int = 0
    # when it first got a lane; queue time is this minus arrival_s
    first_scheduled_s: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """True while some of the prompt's log-probabilities are missing: they come from computing it, so none of it may be taken
        from the cache."""
        return self.params.num_prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def max_known_tokens(self) -> int:
        """Most tokens the request can know once every step in flight is done."""
        return min(self.num_known_tokens + self.max_tokens_in_flight, self.max_total_tokens)

    @property
    def is_surely_finished(self) -> bool:
        """True if the steps in flight end the request whatever they draw: each draws at least one token unless it finished."""
        return self.num_known_tokens + self.num_draws_in_flight >= self.max_total_tokens

    @property
    def known_token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
