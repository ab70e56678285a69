"""The caller's side alone, against a hand-played engine."""

from __future__ import annotations

import asyncio

import pytest

from medusa_core.engine.messages import Abort, Command, Failed, Outputs, Rejected, Submit, WireError
from medusa_core.engine.streams import Streams
from medusa_core.errors import EngineDeadError, EngineError, InvalidParameterError, QueueFullError
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
    assert streams.num_open == 1
    with pytest.raises(InvalidParameterError):
        await collect(streams, make_request("a", [6]))
    streams.receive(outputs("a", [5]))
    streams.receive(outputs("a", [], FinishReason.ABORT))
    again = asyncio.create_task(collect(streams, make_request("a", [6])))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [6], FinishReason.STOP))
    assert tokens_of(await again) == [6]
    assert streams.num_open == 0


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


async def test_a_reader_that_is_behind_gets_all_that_has_arrived_at_once():
    streams, sent = attached()
    reading = streams.generate_many([make_request("a", [5]), make_request("b", [6])])
    first = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [1]))
    streams.receive(outputs("b", [2]))
    streams.receive(outputs("a", [3, 4]))
    assert [(delta.request_id, delta.token_ids) for delta in await first] == [("a", [1]), ("b", [2]), ("a", [3, 4])]
    streams.receive(outputs("a", [5], FinishReason.STOP))
    assert [delta.token_ids for delta in await anext(reading)] == [[5]]
    streams.receive(outputs("b", [6]))
    streams.receive(outputs("b", [7], FinishReason.STOP))
    assert [[delta.token_ids for delta in batch] async for batch in reading] == [[[6], [7]]]
    assert [type(command) for command in sent] == [Submit, Submit]


async def test_the_first_request_that_fails_ends_the_rest_after_what_came_before():
    streams, sent = attached()
    reading = streams.generate_many([make_request(name, [5]) for name in "abc"])
    first = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [1], FinishReason.STOP))
    streams.receive(Rejected("b", WireError.of(QueueFullError("It is full."))))
    streams.receive(outputs("c", [2]))
    assert [delta.token_ids for delta in await first] == [[1]]
    with pytest.raises(QueueFullError):
        await anext(reading)
    assert sent[3:] == [Abort("c")]


async def test_a_request_that_cannot_be_opened_aborts_those_before_it():
    streams, sent = attached()
    reading = streams.generate_many([make_request("a", [5]), make_request("a", [5])])
    with pytest.raises(InvalidParameterError):
        await anext(reading)
    assert [type(command) for command in sent] == [Submit, Abort]


async def test_closing_the_reader_aborts_every_request():
    streams, sent = attached()
    reading = streams.generate_many([make_request("a", [5]), make_request("b", [5])])
    first = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0)
    streams.receive(outputs("a", [1]))
    await first
    await reading.aclose()
    assert sent[2:] == [Abort("a"), Abort("b")]


async def test_events_for_unknown_requests_are_ignored():
    streams, _ = attached()
    streams.receive(outputs("nobody", [5], FinishReason.STOP, num_steps_total=3))
    assert streams.stats.num_steps_total == 3
