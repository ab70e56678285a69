"""The EngineClient protocol: the same behaviour from a thread and from a process."""

from __future__ import annotations

import asyncio

import pytest

from medusa_core.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    HeadsMismatchError,
    InvalidParameterError,
    PromptError,
    QueueFullError,
)
from medusa_core.outputs import FinishReason
from tests.engine.conftest import MakeClient, StartClient
from tests.engine.fake import POISON_TOKEN, VOCAB_SIZE
from tests.engine.harness import SLOW, collect, make_request, tokens_of, until


async def test_tokens_stream_in_order_and_end_with_a_reason(start_client: StartClient):
    client = await start_client()
    deltas = await collect(client, make_request("a", [5, 6, 7], max_tokens=5))
    assert tokens_of(deltas) == [5, 6, 7, 5, 6]
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.LENGTH]
    assert [delta.is_first for delta in deltas] == [True] + [False] * 4
    assert {delta.request_id for delta in deltas} == {"a"}


async def test_choices_interleave(start_client: StartClient):
    client = await start_client()
    deltas = await collect(client, make_request("a", [5, 6, 7], max_tokens=3, n=3))
    assert [tokens_of(deltas, idx) for idx in range(3)] == [[5, 6, 7], [6, 7, 5], [7, 5, 6]]
    assert [delta.choice_idx for delta in deltas[:3]] == [0, 1, 2]


async def test_many_requests_run_at_once_and_get_their_own_tokens(start_client: StartClient):
    client = await start_client(max_steps_in_flight=1)
    requests = [make_request(str(i), [i, i + 1], max_tokens=20) for i in range(1, 21)]
    results = await asyncio.gather(*(collect(client, request) for request in requests))
    assert [tokens_of(deltas) for deltas in results] == [[i, i + 1] * 10 for i in range(1, 21)]


async def test_one_choice_can_be_aborted_while_the_others_go_on(start_client: StartClient):
    client = await start_client(SLOW)
    deltas = []
    async for delta in client.generate(make_request("a", [5, 6], max_tokens=30, n=2)):
        if not deltas:
            await client.abort("a", 1)
        deltas.append(delta)
    ends = {delta.choice_idx: delta.finish_reason for delta in deltas if delta.finish_reason}
    assert ends == {0: FinishReason.LENGTH, 1: FinishReason.ABORT}
    assert len(tokens_of(deltas, 0)) == 30
    assert len(tokens_of(deltas, 1)) < 30


async def test_abort_of_a_request_ends_every_choice_and_the_stream(start_client: StartClient):
    client = await start_client(SLOW)
    stream = client.generate(make_request("a", [5], max_tokens=5000, n=3))
    first = await anext(stream)
    await client.abort("a")
    rest = [delta async for delta in stream]
    assert first.finish_reason is None
    assert sorted(delta.choice_idx for delta in rest if delta.finish_reason is FinishReason.ABORT) == [0, 1, 2]


async def test_abort_of_an_unknown_request_is_ignored(start_client: StartClient):
    client = await start_client()
    await client.abort("nobody")
    await client.abort("nobody", 3)
    assert tokens_of(await collect(client, make_request("a", [5], max_tokens=2))) == [5, 5]


async def test_closing_the_iterator_aborts_what_still_runs(start_client: StartClient):
    client = await start_client(SLOW)
    stream = client.generate(make_request("a", [5], max_tokens=5000, n=2))
    await anext(stream)
    assert client.stats.num_running == 2
    await stream.aclose()
    await until(lambda: client.stats.num_running == 0)


async def test_cancelling_the_reader_aborts_what_still_runs(start_client: StartClient):
    client = await start_client(SLOW)
    reader = asyncio.create_task(collect(client, make_request("a", [5], max_tokens=5000)))
    await until(lambda: client.stats.num_running == 1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until(lambda: client.stats.num_running == 0)


async def test_an_iterator_that_is_never_read_submits_nothing(start_client: StartClient):
    client = await start_client()
    stream = client.generate(make_request("a", [5], max_tokens=5))
    await stream.aclose()
    assert tokens_of(await collect(client, make_request("a", [6], max_tokens=1))) == [6]


async def test_a_request_id_in_use_is_refused_and_free_again_after_the_end(start_client: StartClient):
    client = await start_client(SLOW)
    stream = client.generate(make_request("a", [5], max_tokens=5000))
    await anext(stream)
    with pytest.raises(InvalidParameterError) as caught:
        await collect(client, make_request("a", [6], max_tokens=1))
    assert caught.value.param == "request_id"
    await client.abort("a")
    assert [delta.finish_reason async for delta in stream][-1] is FinishReason.ABORT
    assert tokens_of(await collect(client, make_request("a", [6], max_tokens=1))) == [6]


async def test_a_wrong_request_is_refused_and_nothing_else_is_disturbed(start_client: StartClient):
    client = await start_client(SLOW)
    good = asyncio.create_task(collect(client, make_request("good", [5], max_tokens=10)))
    with pytest.raises(PromptError, match="token 1 is 1000") as caught:
        await collect(client, make_request("bad", [5, VOCAB_SIZE]))
    assert caught.value.param == "prompt"
    assert tokens_of(await good) == [5] * 10


async def test_a_full_queue_is_the_same_error_on_this_side(start_client: StartClient):
    client = await start_client(SLOW, max_queued_requests=2)
    stream = client.generate(make_request("a", [5], max_tokens=5000, n=2))
    await anext(stream)
    with pytest.raises(QueueFullError, match="full") as caught:
        await collect(client, make_request("b", [5], max_tokens=1))
    assert caught.value.hint == "Try again later."
    await stream.aclose()
    await until(lambda: client.stats.num_running == 0)
    assert tokens_of(await collect(client, make_request("b", [5], max_tokens=1))) == [5]


async def test_a_failing_step_ends_live_requests_with_an_engine_error(start_client: StartClient):
    client = await start_client(SLOW)
    innocent = asyncio.create_task(collect(client, make_request("innocent", [5], max_tokens=5000)))
    await until(lambda: client.stats.num_running == 1)
    with pytest.raises(EngineError) as caught:
        await collect(client, make_request("poison", [POISON_TOKEN], max_tokens=5))
    assert "poisoned" not in str(caught.value)
    with pytest.raises(EngineError):
        await innocent
    await until(lambda: not client.is_ready)


async def test_info_and_readiness_before_start_and_after_close(make_client: MakeClient):
    client = make_client()
    assert not client.is_ready
    with pytest.raises(EngineNotReadyError):
        _ = client.info
    with pytest.raises(EngineNotReadyError):
        await collect(client, make_request("a", [5]))
    info = await client.start()
    try:
        assert info.vocab_size == VOCAB_SIZE
        assert client.info == info
        assert client.is_ready
    finally:
        await client.close()
    assert not client.is_ready


async def test_close_ends_live_requests_and_the_client_can_start_again(make_client: MakeClient):
    client = make_client(SLOW)
    await client.start()
    reader = asyncio.create_task(collect(client, make_request("a", [5], max_tokens=5000)))
    await until(lambda: client.stats.num_running == 1)
    await client.close()
    with pytest.raises(EngineDeadError):
        await reader
    await client.close()
    await client.start()
    assert tokens_of(await collect(client, make_request("a", [5], max_tokens=2))) == [5, 5]
    await client.close()


async def test_a_second_start_is_refused(start_client: StartClient):
    client = await start_client()
    with pytest.raises(EngineError, match="already"):
        await client.start()
    assert tokens_of(await collect(client, make_request("a", [5], max_tokens=1))) == [5]


async def test_a_start_that_is_refused_raises_the_loaders_error(make_client: MakeClient):
    client = make_client("refuse")
    with pytest.raises(HeadsMismatchError, match=r"another model\. Use the right ones\."):
        await client.start()
    assert not client.is_ready
    await client.close()


async def test_two_engines_work_side_by_side(start_client: StartClient):
    one, other = await start_client(SLOW), await start_client(SLOW)
    results = await asyncio.gather(
        collect(one, make_request("a", [5], max_tokens=10)), collect(other, make_request("a", [6], max_tokens=10))
    )
    assert [tokens_of(deltas) for deltas in results] == [[5] * 10, [6] * 10]


async def test_the_last_snapshot_counts_every_step(start_client: StartClient):
    client = await start_client()
    await collect(client, make_request("a", [5], max_tokens=200, n=4))
    stats = client.stats
    assert stats.num_steps_total == 200
    assert stats.num_running == 0
