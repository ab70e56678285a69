"""Offers to go on in another protocol are ignored, and cost neither a body nor a header."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.fakes import FakeClient
from tests.server.test_connections import BODY, HEAD, HEALTH, answer_of, connection

# What Java's HttpClient sends over plain HTTP.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nUpgrade: h2c\r\n"


@pytest.mark.parametrize("is_body_later", [False, True])
async def test_an_offer_of_another_protocol_is_ignored(make_server, is_body_later):
    client = FakeClient()
    url = await make_server(client)
    async with connection(url) as (reader, writer):
        for num_answered in range(2):
            writer.write(HEAD + H2C + f"content-length: {len(BODY)}\r\n\r\n".encode())
            if is_body_later:
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.write(BODY)
            head, _ = await answer_of(reader)
            assert head.startswith(b"HTTP/1.1 200")
            assert len(client.requests) == num_answered + 1
        writer.write(b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("num_later", range(1, len(H2C), 3))
async def test_an_offer_of_another_protocol_in_pieces_loses_no_body_and_changes_no_header(make_server, num_later):
    client = FakeClient()
    url = await make_server(client)
    async with connection(url) as (reader, writer):
        writer.write(HEAD + f"content-length: {len(BODY)}\r\n".encode() + H2C[:-num_later])
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(H2C[-num_later:] + b"\r\n" + BODY + HEALTH)
        answer = await reader.readuntil(b"\r\n\r\n")
        if answer.startswith(b"HTTP/1.1 400"):
            assert not client.requests
        else:
            assert answer.startswith(b"HTTP/1.1 200")
            assert len(client.requests) == 1
            await reader.readuntil(b"HTTP/1.1 200")


async def test_what_is_left_of_an_offer_is_no_part_of_the_header_before(make_server):
    client = FakeClient()
    url = await make_server(client)
    async with connection(url) as (reader, writer):
        writer.write(HEAD + f"content-length: {len(BODY)}\r\nUpgrade: ".encode())
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"9\r\n\r\n" + BODY + HEALTH)
        assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")
        assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")
    assert len(client.requests) == 1


async def test_a_body_may_speak_of_upgrades(make_server):
    client = FakeClient()
    url = await make_server(client)
    body = BODY.replace(b"Hi", b"a\\r\\nUpgrade: h2c")
    raw = b"a\r\nUpgrade: h2c\r\nb"
    async with connection(url) as (reader, writer):
        for sent in (body, raw):
            writer.write(HEAD + f"content-length: {len(sent)}\r\n\r\n".encode() + sent[:3])
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.write(sent[3:])
            head, _ = await answer_of(reader)
            assert head.startswith(b"HTTP/1.1 200" if sent is body else b"HTTP/1.1 400")
    assert client.requests[0].prompt_token_ids == [*map(ord, "a\r\nUpgrade: h2c")]
