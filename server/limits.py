"""Limits per API key: requests per minute, tokens per minute, requests in parallel.

Rates are token buckets: a bucket holds what one minute allows and is refilled steadily, so a client may use that at once
and goes on at the steady rate. What a request will cost in tokens is known only when it has ended: it is admitted while there is
any budget left and charged afterwards, which may leave a debt that later requests wait for. Over time the rate is kept exactly; at
one moment it is exceeded by at most what runs in parallel. (The package `limits` has windows over hits, which can neither charge
more than is left nor count what runs in parallel.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import msgspec

AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
# Seconds after which a client that is refused for its parallel requests may try again: nobody knows when one of them ends.
_PARALLEL_RETRY_S = 1.0


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one key; None is without limit."""

    requests_per_minute: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None
    parallel_requests: AtLeastOne | None = None

    @property
    def is_unlimited(self) -> bool:
        return self.requests_per_minute is None and self.tokens_per_minute is None and self.parallel_requests is None


UNLIMITED = KeyLimits()


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `acquire`. refused_for: the limit that was reached; None if the request may run.

    retry_after_s: seconds after which a refused one may succeed. remaining_*: what is left now, this request taken off, never below
    0. reset_*_s: seconds until the budget is whole again. Zeros where there is no such limit.
    """

    refused_for: Literal["requests", "tokens", "parallel"] | None = None
    retry_after_s: float = 0.0
    remaining_requests: int = 0
    reset_requests_s: float = 0.0
    remaining_tokens: int = 0
    reset_tokens_s: float = 0.0


class RateLimiter(Protocol):
    """Counts per key. `acquire` may ask another process, as several front ends share one truth."""

    async def acquire(self, key_name: str, limits: KeyLimits) -> Allowance:
        """Take a request off the key's budget, unless it is refused. Each one that is allowed must be settled.

        Raises MedusaError, with nothing taken, where there is no answer.
        """
        ...

    def settle(self, key_name: str, limits: KeyLimits, *, num_tokens: int) -> None:
        """An allowed request has ended, having used `num_tokens` of prompts and completions.

        Not a coroutine: it must also work while the request is being cancelled, so an implementation that talks to another process
        sends and does not wait.
        """
        ...


@dataclass(slots=True)
class _Bucket:
    """What is left of a minute's budget; below 0 in debt. None: never used, so still full whatever the limit is."""

    level: float | None = None
    updated_s: float = 0.0

    def refill(self, per_minute: int, now_s: float) -> float:
        level = per_minute if self.level is None else self.level + (now_s - self.updated_s) * per_minute / 60
        # A limit may have become smaller since.
        self.level, self.updated_s = min(float(per_minute), level), now_s
        return self.level

    def take(self, amount: int) -> None:
        """After a `refill`."""
        assert self.level is not None
        self.level -= amount


@dataclass(slots=True)
class _Account:
    num_parallel: int = 0
    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)


class InMemoryLimiter:
    """A RateLimiter for one event loop. It forgets everything when its process ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # As many as there are names of keys.
        self._accounts: dict[str, _Account] = {}

    async def acquire(self, key_name: str, limits: KeyLimits) -> Allowance:
        account = self._accounts.setdefault(key_name, _Account())
        now_s = self._clock()
        if limits.parallel_requests is not None and account.num_parallel >= limits.parallel_requests:
            return _allowance(account, limits, now_s, refused_for="parallel", retry_after_s=_PARALLEL_RETRY_S)
        if limits.requests_per_minute is not None and (left := account.requests.refill(limits.requests_per_minute, now_s)) < 1:
            wait_s = _refill_s(1 - left, limits.requests_per_minute)
            return _allowance(account, limits, now_s, refused_for="requests", retry_after_s=wait_s)
        if limits.tokens_per_minute is not None and (left := account.tokens.refill(limits.tokens_per_minute, now_s)) < 1:
            wait_s = _refill_s(1 - left, limits.tokens_per_minute)
            return _allowance(account, limits, now_s, refused_for="tokens", retry_after_s=wait_s)
        account.num_parallel += 1
        if limits.requests_per_minute is not None:
            account.requests.take(1)
        return _allowance(account, limits, now_s)

    def settle(self, key_name: str, limits: KeyLimits, *, num_tokens: int) -> None:
        account = self._accounts[key_name]
        account.num_parallel -= 1
        if limits.tokens_per_minute is not None:
            account.tokens.refill(limits.tokens_per_minute, self._clock())
            account.tokens.take(num_tokens)


def _allowance(
    account: _Account,
    limits: KeyLimits,
    now_s: float,
    *,
    refused_for: Literal["requests", "tokens", "parallel"] | None = None,
    retry_after_s: float = 0.0,
) -> Allowance:
    remaining_requests, reset_requests_s = _state(account.requests, limits.requests_per_minute, now_s)
    remaining_tokens, reset_tokens_s = _state(account.tokens, limits.tokens_per_minute, now_s)
    return Allowance(
        refused_for=refused_for,
        retry_after_s=retry_after_s,
        remaining_requests=remaining_requests,
        reset_requests_s=reset_requests_s,
        remaining_tokens=remaining_tokens,
        reset_tokens_s=reset_tokens_s,
    )


def _state(bucket: _Bucket, per_minute: int | None, now_s: float) -> tuple[int, float]:
    """What remains, and the seconds until it is whole."""
    if per_minute is None:
        return 0, 0.0
    level = bucket.refill(per_minute, now_s)
    return max(0, math.floor(level)), _refill_s(per_minute - level, per_minute)


def _refill_s(amount: float, per_minute: int) -> float:
    return amount * 60 / per_minute


_HEADERS_OF_REQUESTS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")
_HEADERS_OF_TOKENS = ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens")
RATE_LIMIT_HEADERS = (*_HEADERS_OF_REQUESTS, *_HEADERS_OF_TOKENS)


def rate_limit_headers(limits: KeyLimits, allowance: Allowance) -> dict[str, str]:
    """`x-ratelimit-*` in OpenAI's words, and `retry-after` for a refusal."""
    headers: dict[str, str] = {}
    for names, limit, remaining, reset_s in (
        (_HEADERS_OF_REQUESTS, limits.requests_per_minute, allowance.remaining_requests, allowance.reset_requests_s),
        (_HEADERS_OF_TOKENS, limits.tokens_per_minute, allowance.remaining_tokens, allowance.reset_tokens_s),
    ):
        if limit is not None:
            headers |= zip(names, (str(limit), str(remaining), duration(reset_s)), strict=True)
    if allowance.refused_for is not None:
        headers["retry-after"] = str(max(1, math.ceil(allowance.retry_after_s)))
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 7s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, seconds_left = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{seconds_left}s" if minutes else f"{seconds_left}s"
