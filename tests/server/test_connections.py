"""Clients that keep a connection waiting, or send too much before they ask for anything."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from unittest.mock import Mock
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from server.connection import MAX_HEAD_BYTES, MAX_REQUESTS_AHEAD, connection_options
from server.settings import ServerSettings
from tests.server.fakes import FakeClient
from tests.server.test_bad_input import error_of
from tests.server.test_disconnect import until

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
BODY = b'{"model": "tiny", "prompt": "Hi"}'
HEALTH = b"GET /health HTTP/1.1\r\n\r\n"
WHOLE = HEAD + f"content-length: {len(BODY)}\r\n\r\n".encode() + BODY


def whole(*, stream):
    body = BODY[:-1] + b', "stream": true}'
    return HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body if stream else WHOLE


@asynccontextmanager
async def connection(url):
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()


async def until_closed(reader):
    """All that came before the connection was closed or reset."""
    data = b""
    try:
        while piece := await reader.read(65536):
            data += piece
    except ConnectionError:
        pass
    return data


async def answer_of(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


@pytest.mark.parametrize("start", [b"", b"POST /v1/comp", HEAD, b"\r\n", WHOLE + b"\r\n", WHOLE + b"POST /v1/comp"])
async def test_a_connection_that_never_sends_its_headers_is_closed(make_server, start):
    url = await make_server(receive_timeout_s=0.3, keep_alive_timeout_s=20)
    async with connection(url) as (reader, writer):
        writer.write(start)
        if start.startswith(WHOLE):
            assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")
            writer.write(b"\r\n")
        assert await until_closed(reader) == b""


async def test_trickling_does_not_help(make_server):
    url = await make_server(receive_timeout_s=0.3)
    async with connection(url) as (reader, writer):
        closed = asyncio.create_task(until_closed(reader))
        for byte in HEAD * 100:
            writer.write(bytes([byte]))
            if closed in (await asyncio.wait({closed}, timeout=0.05))[0]:
                break
        assert await closed == b""


async def test_a_body_that_does_not_come_is_answered_408_and_the_connection_closed(make_server):
    url = await make_server(receive_timeout_s=0.3)
    for length in (len(BODY), 10_000_000):
        async with connection(url) as (reader, writer):
            writer.write(HEAD + f"content-length: {length}\r\n\r\n".encode() + BODY[:5])
            answer = await until_closed(reader)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in answer
            assert b'"code":"request_timeout"' in answer
            assert b"--receive-timeout-s" in answer


async def test_answers_may_take_longer_than_requests(make_server):
    client = FakeClient(step_s=0.1)
    async with httpx.AsyncClient(base_url=await make_server(client, receive_timeout_s=0.2), trust_env=False) as http:
        for is_stream in (False, True):
            response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", "stream": is_stream})
            assert response.status_code == 200


async def test_headers_have_a_limit(make_server):
    url = await make_server()
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        assert (await http.get("/health", headers={"x-big": "a" * (MAX_HEAD_BYTES // 2)})).status_code == 200
    async with connection(url) as (reader, writer):
        writer.write(HEAD + b"x-more: " + b"a" * MAX_HEAD_BYTES)
        assert await until_closed(reader) == b""
    async with connection(url) as (reader, writer):
        writer.write(HEAD)
        closed = asyncio.create_task(until_closed(reader))
        while not closed.done():
            writer.write(b"x-more: " + b"a" * 1000 + b"\r\n")
            await asyncio.sleep(0.001)
        assert await closed == b""


def connect(app):
    """A connection to `app` without a network, so that a test says in which pieces data comes."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, **connection_options(ServerSettings(keep_alive_timeout_s=1)))
    config.load()
    protocol = config.http_protocol_class(config, ServerState(), {})
    protocol.connection_made(Mock(**{"is_closing.return_value": False}))
    return protocol


def written(protocol):
    return b"".join(call.args[0] for call in protocol.transport.write.call_args_list)


async def read_whole(receive):
    body, message = b"", {"more_body": True}
    while message["more_body"]:
        message = await receive()
        body += message["body"]
    return body


async def answer(send, body=b""):
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def test_headers_that_come_at_once_have_the_same_limit():
    async def app(_scope, _receive, _send):
        raise AssertionError

    protocol = connect(app)
    protocol.data_received(b"GET /health HTTP/1.1\r\nx-big: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n")
    assert written(protocol).startswith(b"HTTP/1.1 400 ")
    assert protocol.transport.close.called
    assert not protocol.tasks
    protocol.connection_lost(None)


@pytest.mark.parametrize("is_refused", [False, True])
@pytest.mark.parametrize(
    ("start", "piece"),
    [(b"0\r\n", b"a: b\r\n" * 1000), (b"0\r\n", b"a" * 6000), (b"0\r\na: ", b"b" * 6000), (b"5;", b"a" * 6000)],
    ids=["trailers", "name of a trailer", "value of a trailer", "extension of a chunk"],
)
async def test_what_stands_around_the_chunks_of_a_body_has_the_same_limit(make_server, start, piece, is_refused):
    url = await make_server(api_key=("one",) if is_refused else ())
    async with connection(url) as (reader, writer):
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nagain\r\n")
        if is_refused:
            assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 401")
        writer.write(start)
        closed = asyncio.create_task(until_closed(reader))
        while not closed.done():
            writer.write(piece)
            await asyncio.sleep(0.001)
        assert await closed == b""


async def test_trailers_are_no_headers():
    seen = []

    async def app(scope, receive, send):
        body = await read_whole(receive)
        seen.append((body, [name for name, _ in scope["headers"]]))
        await answer(send)

    protocol = connect(app)
    for piece in (
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"2\r\nHi\r\n0\r\n",
        b"authorization: no\r\na: b\r\n",
        b"\r\n",
    ):
        protocol.data_received(piece)
    await asyncio.gather(*protocol.tasks)
    assert seen == [(b"Hi", [b"transfer-encoding"])]
    assert written(protocol).startswith(b"HTTP/1.1 200 ")
    protocol.connection_lost(None)


async def test_bodies_do_not_count_as_headers():
    async def app(scope, receive, send):
        await answer(send, str(len(await read_whole(receive))).encode())

    protocol = connect(app)
    size = 3 * MAX_HEAD_BYTES
    head = f"POST / HTTP/1.1\r\ncontent-length: {size}\r\n\r\n".encode()
    data = (head + b"x" * size) * 3
    # The end of one and the beginning of the next come together; the last cut is within headers.
    for start, end in ((0, size), (size, len(data) * 2 // 3 + 10), (len(data) * 2 // 3 + 10, len(data))):
        protocol.data_received(data[start:end])
        await asyncio.sleep(0)
    while protocol.tasks:
        await asyncio.gather(*protocol.tasks)
        await asyncio.sleep(0)
    assert not protocol.transport.abort.called
    assert written(protocol).count(str(size).encode()) == 3
    protocol.connection_lost(None)


async def test_headers_do_not_count_once_they_are_answered(make_server):
    url = await make_server()
    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=1), trust_env=False) as http:
        for _ in range(3):
            assert (await http.get("/health", headers={"x-big": "a" * (MAX_HEAD_BYTES // 2)})).status_code == 200


async def test_headers_have_a_limit_while_an_answer_is_under_way(make_server):
    client = FakeClient(gate=asyncio.Event())
    url = await make_server(client)
    async with connection(url) as (reader, writer):
        writer.write(WHOLE)
        await until(lambda: client.num_live == 1)
        writer.write(HEAD + b"x-more: 1\r\n" * MAX_HEAD_BYTES)
        assert await until_closed(reader) == b""
        await until(lambda: client.num_live == 0)


async def test_requests_sent_ahead_are_answered_in_turn(make_server):
    url = await make_server()
    async with connection(url) as (reader, writer):
        for request in (WHOLE + HEALTH, WHOLE, WHOLE):
            writer.write(request)
            await asyncio.sleep(0)
        bodies = [(await answer_of(reader))[1] for _ in range(4)]
    assert [b'"text_completion"' in body for body in bodies] == [True, False, True, True]


async def test_as_many_requests_may_wait_and_no_more(make_server):
    client = FakeClient(gate=asyncio.Event())
    url = await make_server(client)
    for num_ahead in (MAX_REQUESTS_AHEAD, MAX_REQUESTS_AHEAD + 1):
        async with connection(url) as (reader, writer):
            writer.write(WHOLE)
            await until(lambda: client.num_live == 1)
            writer.write(HEALTH * num_ahead)
            if num_ahead == MAX_REQUESTS_AHEAD:
                client.gate.set()
                assert b'"text_completion"' in (await answer_of(reader))[1]
                for _ in range(num_ahead):
                    assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")
                client.gate.clear()
            else:
                assert (await until_closed(reader)).startswith(b"HTTP/1.1 400 ")
                await until(lambda: client.num_live == 0)


async def test_a_refusal_is_not_written_into_an_answer_under_way(make_server):
    url = await make_server(FakeClient(gate=asyncio.Event(), num_free_steps=1))
    async with connection(url) as (reader, writer):
        writer.write(whole(stream=True))
        assert (await reader.readuntil(b"\n\n")).startswith(b"HTTP/1.1 200")
        writer.write(b"\x16\x03\x01\x02\x00\x01 TLS, perhaps\r\n\r\n")
        assert b"Invalid HTTP" not in await until_closed(reader)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ahead", [WHOLE, WHOLE[:-5], HEALTH], ids=["whole", "part", "other"])
@pytest.mark.parametrize("is_later", [False, True])
async def test_a_client_that_leaves_frees_its_place_whatever_it_has_sent_ahead(make_server, stream, ahead, is_later):
    client = FakeClient(gate=asyncio.Event(), num_free_steps=1)
    url = await make_server(client)
    async with connection(url) as (_, writer):
        # The first one is answered at once, so that the second has waited for its turn.
        writer.write(HEALTH + whole(stream=stream) + (b"" if is_later else ahead))
        await until(lambda: client.deltas)
        if is_later:
            writer.write(ahead)
            await asyncio.sleep(0.1)
    await until(lambda: client.num_live == 0)
    assert len(client.requests) == 1


async def test_a_refusal_does_not_cut_off_a_body_under_way_unless_it_never_ends(make_server):
    url = await make_server(api_key=("one",), receive_timeout_s=0.5)
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        assert error_of(await http.post("/v1/completions", content=b"x" * 5_000_000), 401)["code"] == "invalid_api_key"
        assert (await http.get("/v1/models", headers={"authorization": "Bearer one"})).status_code == 200
    async with connection(url) as (reader, writer):
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 401")
        closed = asyncio.create_task(until_closed(reader))
        while not closed.done():
            writer.write(b"5\r\nagain\r\n")
            await asyncio.sleep(0.02)
        assert await closed == b""


@pytest.mark.parametrize("rest", [BODY, BODY + b"POST /v1/comp"])
async def test_a_connection_is_idle_when_the_body_has_come_after_its_refusal(make_server, rest):
    url = await make_server(api_key=("one",), keep_alive_timeout_s=1)
    async with connection(url) as (reader, writer):
        writer.write(HEAD + f"content-length: {len(BODY)}\r\n\r\n".encode())
        assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 401")
        writer.write(rest)
        assert await until_closed(reader) == b""


async def test_a_request_that_comes_with_the_rest_of_a_refused_body_is_not_idle():
    async def app(scope, receive, send):
        if scope["method"] == "GET":
            await asyncio.sleep(1.5)
        await answer(send, scope["method"].encode())

    protocol = connect(app)
    protocol.data_received(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n")
    await asyncio.gather(*protocol.tasks)
    protocol.data_received(b"HiGET / HTTP/1.1\r\n\r\n")
    await asyncio.gather(*protocol.tasks)
    assert not protocol.transport.close.called
    assert written(protocol).endswith(b"GET")
    protocol.connection_lost(None)


async def test_an_idle_connection_is_closed_between_requests(make_server):
    url = await make_server(keep_alive_timeout_s=1)
    async with connection(url) as (reader, writer):
        for _ in range(2):
            writer.write(WHOLE)
            assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")
        assert await until_closed(reader) == b""


async def test_what_is_no_http_is_told_so(make_server):
    url = await make_server()
    async with connection(url) as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00\x01 TLS, perhaps\r\n\r\n")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 400 ")


async def test_a_declared_length_that_is_too_large_is_refused_before_the_body(make_server):
    url = await make_server(max_body_bytes=100)
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        assert error_of(await http.post("/v1/completions", content=b"x" * 200), 413)["code"] == "request_too_large"


@pytest.mark.parametrize("is_too_large", [False, True])
async def test_a_client_that_leaves_frees_its_place_though_it_has_sent_a_large_body_ahead(make_server, is_too_large):
    client = FakeClient(gate=asyncio.Event(), num_free_steps=1)
    url = await make_server(client, max_body_bytes=290_000 if is_too_large else 2_000_000)
    async with connection(url) as (reader, writer):
        writer.write(whole(stream=True))
        await reader.readuntil(b"data: ")
        large = b'{"model": "tiny", "prompt": "' + b"x" * 300_000 + b'"}'
        writer.write(HEAD + f"content-length: {len(large)}\r\n\r\n".encode() + large)
        if is_too_large:
            await until_closed(reader)
    await until(lambda: client.num_live == 0)
