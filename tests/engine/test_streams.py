"""The caller's side alone, against a hand-played engine."""

from __future__ import annotations

import asyncio

import pytest

from medusa_core.engine.messages import Abort, Command, Failed, Outputs, Submit, WireError
from medusa_core.engine.streams import Streams
from medusa_core.errors import EngineDeadError, EngineError, InvalidParameterError
from medusa_core.outputs import EngineStats, FinishReason, TokenDelta
from tests.engine.harness import collect, make_request, tokens_of


def attached() -> tuple[Streams, list[Command]]:
    streams, sent = Streams(), []
    streams.attach(sent.append, EngineStats())
    return streams, sent


def outputs(request_id: str, token_ids: list[int], reason: FinishReason | None = None, **stats: int) -> Outputs:
    delta = TokenDelta(request_id=request_id, choice_idx=0, token_ids=token_ids, finish_reason=reason)
    return Outputs([delta], EngineStats(**stats))


async def test_a_late_delta_of_an_abandoned_request_never_reaches_a_new_one_of_the_same_id():
    streams, sent = attached()
    stream = streams.generate(make_request("a", [5]))
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [5]))
    await reading
    await stream.aclose()
    assert sent[-1] == Abort("a")
    with pytest.raises(InvalidParameterError):
        await collect(streams, make_request("a", [6]))
    streams.receive(outputs("a", [5]))
    streams.receive(outputs("a", [], FinishReason.ABORT))
    again = asyncio.create_task(collect(streams, make_request("a", [6])))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [6], FinishReason.STOP))
    assert tokens_of(await again) == [6]


async def test_a_finished_request_is_not_aborted():
    streams, sent = attached()
    reading = asyncio.create_task(collect(streams, make_request("a", [5])))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [5], FinishReason.STOP, num_running=7))
    await reading
    await streams.generate(make_request("b", [5])).aclose()
    assert [type(command) for command in sent] == [Submit]
    assert streams.stats.num_running == 7


async def test_tokens_that_arrived_before_the_engine_was_lost_are_still_read():
    streams, sent = attached()
    reading = streams.generate(make_request("a", [5]))
    first = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [5], num_running=1))
    streams.detach(EngineDeadError("It died."))
    assert (await first).token_ids == [5]
    with pytest.raises(EngineDeadError):
        await anext(reading)
    assert streams.stats == EngineStats()
    assert [type(command) for command in sent] == [Submit]


async def test_each_reader_raises_an_exception_of_its_own():
    streams, _ = attached()
    readers = [asyncio.create_task(collect(streams, make_request(name, [5]))) for name in "ab"]
    await asyncio.sleep(0)
    streams.receive(Failed(WireError.of(EngineError("It failed.", hint="Try again."))))
    one, other = await asyncio.gather(*readers, return_exceptions=True)
    assert type(one) is type(other) is EngineError
    assert one is not other
    assert str(one) == str(other) == "It failed. Try again."
    assert one.hint == "Try again."


async def test_events_for_unknown_requests_are_ignored():
    streams, _ = attached()
    streams.receive(outputs("nobody", [5], FinishReason.STOP, num_steps_total=3))
    assert streams.stats.num_steps_total == 3
