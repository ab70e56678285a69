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

from server.connection import MAX_HEAD_BYTES, connection_options
from server.settings import ServerSettings
from tests.server.fakes import FakeClient
from tests.server.test_bad_input import error_of

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
BODY = b'{"model": "tiny", "prompt": "Hi"}'
WHOLE = HEAD + f"content-length: {len(BODY)}\r\n\r\n".encode() + BODY


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


async def test_headers_that_come_at_once_have_the_same_limit():
    async def app(_scope, _receive, _send):
        raise AssertionError

    config = uvicorn.Config(app, **connection_options(ServerSettings()))
    config.load()
    protocol = config.http_protocol_class(config, ServerState(), {})
    transport = Mock()
    protocol.connection_made(transport)
    protocol.data_received(b"GET /health HTTP/1.1\r\nx-big: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n")
    assert transport.write.call_args.args[0].startswith(b"HTTP/1.1 400 ")
    assert transport.close.called
    assert not protocol.tasks
    protocol.connection_lost(None)


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
