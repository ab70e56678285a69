"""The limits of one key, against a clock that is set by hand."""

from __future__ import annotations

import pytest

from server.limits import InMemoryLimiter, KeyLimits, duration, rate_limit_headers


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limiter(clock):
    return InMemoryLimiter(clock)


async def test_without_limits_everything_runs(limiter):
    for _ in range(100):
        assert (await limiter.acquire("a", KeyLimits())).refused_for is None


async def test_a_minutes_requests_may_come_at_once_and_then_one_by_one(limiter, clock):
    limits = KeyLimits(requests_per_minute=6)
    answers = [await limiter.acquire("a", limits) for _ in range(7)]
    assert [answer.refused_for for answer in answers] == [None] * 6 + ["requests"]
    assert [answer.remaining_requests for answer in answers] == [5, 4, 3, 2, 1, 0, 0]
    assert answers[-1].retry_after_s == pytest.approx(10)
    assert answers[-1].reset_requests_s == pytest.approx(60)
    clock.now_s += 9.9
    assert (await limiter.acquire("a", limits)).refused_for == "requests"
    clock.now_s += 0.2
    assert (await limiter.acquire("a", limits)).refused_for is None
    assert (await limiter.acquire("a", limits)).refused_for == "requests"


async def test_a_long_pause_saves_up_one_minute_and_no_more(limiter, clock):
    limits = KeyLimits(requests_per_minute=2)
    await limiter.acquire("a", limits)
    clock.now_s += 3600
    assert [(await limiter.acquire("a", limits)).refused_for for _ in range(3)] == [None, None, "requests"]


async def test_tokens_are_charged_when_a_request_ends_and_a_debt_is_waited_for(limiter, clock):
    limits = KeyLimits(tokens_per_minute=60)
    assert (await limiter.acquire("a", limits)).remaining_tokens == 60
    limiter.settle("a", limits, num_tokens=90)
    refused = await limiter.acquire("a", limits)
    assert (refused.refused_for, refused.remaining_tokens) == ("tokens", 0)
    assert refused.retry_after_s == pytest.approx(31)
    clock.now_s += refused.retry_after_s
    assert (await limiter.acquire("a", limits)).refused_for is None


async def test_only_so_many_run_at_once(limiter):
    limits = KeyLimits(parallel_requests=2, requests_per_minute=100)
    for _ in range(2):
        await limiter.acquire("a", limits)
    refused = await limiter.acquire("a", limits)
    assert refused.refused_for == "parallel"
    # a request that is refused costs nothing
    assert refused.remaining_requests == 98
    limiter.settle("a", limits, num_tokens=0)
    assert (await limiter.acquire("a", limits)).refused_for is None


async def test_keys_do_not_share(limiter):
    limits = KeyLimits(requests_per_minute=1)
    for name in ("a", "b"):
        assert (await limiter.acquire(name, limits)).refused_for is None
        assert (await limiter.acquire(name, limits)).refused_for == "requests"


async def test_limits_may_change_while_requests_run(limiter):
    await limiter.acquire("a", KeyLimits(requests_per_minute=100, tokens_per_minute=100))
    tighter = KeyLimits(requests_per_minute=2, parallel_requests=2)
    assert (await limiter.acquire("a", tighter)).remaining_requests == 1
    limiter.settle("a", tighter, num_tokens=5)
    assert (await limiter.acquire("a", KeyLimits())).refused_for is None


async def test_headers_are_openais(limiter):
    limits = KeyLimits(requests_per_minute=60, tokens_per_minute=1000)
    headers = rate_limit_headers(limits, await limiter.acquire("a", limits))
    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "1000",
        "x-ratelimit-reset-tokens": "0ms",
    }
    limiter.settle("a", limits, num_tokens=3000)
    refused = rate_limit_headers(limits, await limiter.acquire("a", limits))
    assert (refused["retry-after"], refused["x-ratelimit-reset-tokens"]) == ("121", "3m0s")


def test_durations():
    assert [duration(seconds) for seconds in (0.0, 0.0101, 1, 59.2, 60, 3601)] == ["0ms", "11ms", "1s", "1m0s", "1m0s", "60m1s"]
