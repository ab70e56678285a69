"""Limits of a key are counted in one place, whichever front end admits its requests."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from server.front_ends.manager import FrontEndManager
from server.front_ends.messages import Acquire, Admitted, FromFrontEnd, Settle, ToFrontEnd
from server.front_ends.shared_limits import RemoteLimiter, SharedLimiter
from server.limits import KeyLimits
from server.settings import ServerSettings
from tests.engine.harness import FAKE_BUILD, make_config

TWO_AT_ONCE = KeyLimits(parallel_requests=2)
TOKENS = KeyLimits(tokens_per_minute=100)


class Line:
    """Between one front end and the main process, without a socket."""

    def __init__(self, name, shared):
        self.name = name
        self.shared = shared
        self.limiter = RemoteLimiter(self)

    def send(self, message):
        assert isinstance(message, Settle)
        self.shared.settle(self.name, message)

    async def ask(self, make_question):
        self.admitted = await self.shared.acquire(self.name, make_question(1))
        return self.admitted.allowance


async def test_all_front_ends_draw_on_one_budget():
    shared = SharedLimiter()
    one, other = Line("0-0", shared).limiter, Line("1-0", shared).limiter
    assert (await one.acquire("alice", TWO_AT_ONCE)).refused_for is None
    assert (await other.acquire("alice", TWO_AT_ONCE)).refused_for is None
    assert (await one.acquire("alice", TWO_AT_ONCE)).refused_for == "parallel"
    assert (await one.acquire("bob", TWO_AT_ONCE)).refused_for is None
    other.settle("alice", TWO_AT_ONCE, num_tokens=0)
    assert (await one.acquire("alice", TWO_AT_ONCE)).refused_for is None
    assert (await one.acquire("carol", TOKENS)).refused_for is None
    one.settle("carol", TOKENS, num_tokens=200)
    assert (await other.acquire("carol", TOKENS)).refused_for == "tokens"


async def test_a_front_end_that_dies_settles_what_it_had_not():
    shared = SharedLimiter()
    dying, other = Line("0-0", shared), Line("1-0", shared)
    await dying.limiter.acquire("alice", TWO_AT_ONCE)
    dying.limiter.settle("alice", TWO_AT_ONCE, num_tokens=0)
    await dying.limiter.acquire("alice", TWO_AT_ONCE)
    await other.limiter.acquire("alice", TWO_AT_ONCE)
    shared.forget("0-0")
    shared.forget("never asked")
    assert (await other.limiter.acquire("alice", TWO_AT_ONCE)).refused_for is None
    assert (await other.limiter.acquire("alice", TWO_AT_ONCE)).refused_for == "parallel"


async def test_a_front_end_that_has_died_since_it_asked_takes_nothing():
    with socket.socket() as listener:
        manager = FrontEndManager(make_config(), ServerSettings(), listener, build=FAKE_BUILD, load_text="")
        for _ in range(2):
            await manager._answer_acquire("0-0", Acquire(1, "alice", TWO_AT_ONCE))
        admitted = await manager._limiter.acquire("1-0", Acquire(1, "alice", TWO_AT_ONCE))
    assert admitted.allowance.refused_for is None


async def test_an_allowance_that_nobody_waits_for_any_more_is_given_back():
    shared = SharedLimiter()
    line = Line("0-0", shared)
    for _ in range(2):
        await line.limiter.acquire("alice", TWO_AT_ONCE)
    admitted = line.admitted
    await line.limiter.acquire("alice", TWO_AT_ONCE)
    line.limiter.give_back(line.admitted)  # was refused: there is nothing to give back
    assert (await line.limiter.acquire("alice", TWO_AT_ONCE)).refused_for == "parallel"
    line.limiter.give_back(admitted)
    assert (await line.limiter.acquire("alice", TWO_AT_ONCE)).refused_for is None


def test_messages_survive_the_wire():
    question = Acquire(3, "alice", TWO_AT_ONCE)
    admitted = asyncio.run(SharedLimiter().acquire("0-0", question))
    for message, message_type in [
        (question, FromFrontEnd),
        (Settle("alice", TOKENS, 7), FromFrontEnd),
        (admitted, ToFrontEnd),
    ]:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=message_type) == message
    assert isinstance(admitted, Admitted)
