"""The stream client: frames however they are cut, connections kept and lost, errors told apart."""

from __future__ import annotations

import pytest

from medusa_core.bench.chat_request import chat_body, read_answer
from medusa_core.bench.http_stream import Address, Answer, Connection, EventParser, StreamError
from medusa_core.bench.records import RequestRecord
from medusa_core.errors import ConfigError
from tests.bench.stub_server import Script, chat_frames, chunked, event, plain, serving


def request(address: Address, body: bytes = b"{}") -> bytes:
    return address.request("POST", "/v1/chat/completions", body)


async def ask(script: Script, body: bytes = b"{}") -> Answer:
    async with serving(lambda _: script) as stub:
        address = Address("127.0.0.1", stub.port)
        connection = Connection(address)
        try:
            return await connection.send(request(address, body))
        finally:
            connection.close()


def datas(answer: Answer) -> list[bytes]:
    return [data for _, data in answer.events]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_how_the_body_is_cut(size):
    body = b": ping\n\ndata: one\n\nevent: x\ndata: two\r\ndata:three\r\n\r\ndata: \xc3\xa9\n\n\n\ndata: cut"
    parser = EventParser()
    events = [data for start in range(0, len(body), size) for data in parser.feed(body[start : start + size])]
    assert events == [b"one", b"two\nthree", b"\xc3\xa9"]


async def test_chunks_that_split_frames_and_frames_that_share_a_chunk():
    whole = event(b"first") + event(b"second") + event(b"[DONE]")
    answer = await ask(chunked(whole[:9], whole[9:20], whole[20:]))
    assert datas(answer) == [b"first", b"second", b"[DONE]"]
    assert answer.status == 200


async def test_frames_are_stamped_when_they_arrive():
    answer = await ask(chunked(event(b"a"), event(b"b") + event(b"c")))
    a, b, c = (time_s for time_s, _ in answer.events)
    assert a < b == c


async def test_chunks_cut_in_the_middle_by_the_network():
    stream = b"".join(chunked(event(b"a"), event(b"b")))
    answer = await ask([stream[i : i + 5] for i in range(0, len(stream), 5)])
    assert datas(answer) == [b"a", b"b"]


async def test_a_stream_up_to_the_end_of_the_connection():
    answer = await ask([b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", event(b"a"), event(b"b"), None])
    assert datas(answer) == [b"a", b"b"]


async def test_chunk_extensions_and_trailers():
    script = [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ntransfer-encoding: Chunked\r\n\r\n",
        b"9;note=1\r\n" + event(b"a") + b"\r\n",
        b"0\r\nX-Sum: 1\r\n\r\n",
    ]
    assert datas(await ask(script)) == [b"a"]


async def test_an_error_answer_has_a_status_and_a_body():
    answer = await ask(plain("429 Too Many Requests", b'{"error": {"message": "full"}}'))
    assert (answer.status, answer.body, answer.events) == (429, b'{"error": {"message": "full"}}', [])


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([None], "without an answer"),
        ([b"HTTP/1.1 200 OK\r\nContent-", None], "cut short"),
        ([*chunked(event(b"a"))[:-1], None], "cut short"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", None], "cut short"),
        ([b"HTTP/1.1 abc\r\n\r\n", None], "not HTTP"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", None], "not HTTP"),
    ],
)
async def test_broken_answers_are_stream_errors(script, message):
    with pytest.raises(StreamError, match=message):
        await ask(script)


async def test_nobody_listens():
    async with serving(lambda _: []) as stub:
        port = stub.port
    with pytest.raises(StreamError, match="refused"):
        await Connection(Address("127.0.0.1", port)).send(request(Address("127.0.0.1", port)))


async def test_a_connection_is_kept_and_opened_again_when_the_server_has_closed_it():
    scripts: list[Script] = [
        chunked(event(b"1")),
        [*plain("200 OK", b"{}"), None],
        plain("200 OK", b"{}", "Connection: close"),
        plain("200 OK", b"[]"),
    ]
    async with serving(lambda number: scripts[number]) as stub:
        address = Address("127.0.0.1", stub.port)
        connection = Connection(address)
        seen = []
        for _ in scripts:
            answer = await connection.send(request(address))
            seen.append((answer.status, stub.num_connections))
        connection.close()
    # the second answer's connection is closed silently; the third says so
    assert seen == [(200, 1), (200, 1), (200, 2), (200, 3)]


async def test_a_request_says_what_http_wants():
    async with serving(lambda _: plain("200 OK", b"{}")) as stub:
        address = Address("127.0.0.1", stub.port, prefix="/llm")
        connection = Connection(address)
        await connection.send(address.request("POST", "/v1/chat/completions", b'{"a": 1}', api_key="secret"))
        connection.close()
        head, body = stub.requests[0]
    assert head.startswith("POST /llm/v1/chat/completions HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{stub.port}\r\n" in head
    assert "Authorization: Bearer secret\r\n" in head
    assert body == b'{"a": 1}'


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000", Address("localhost", 8000)),
        ("http://localhost:8000/v1/", Address("localhost", 8000)),
        ("https://api.example.org/llm/v1", Address("api.example.org", 443, "/llm", is_tls=True)),
        ("http://[::1]", Address("::1", 80)),
    ],
)
def test_addresses(url, expected):
    assert Address.parse(url) == expected


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://me:key@x", "http://x/v1?key=1", "http://x#y"]
)
def test_wrong_addresses(url):
    with pytest.raises(ConfigError, match="--url"):
        Address.parse(url)


def read(*frames: bytes, status: int = 200, body: bytes = b"") -> RequestRecord:
    parser = EventParser()
    events = [(float(number), data) for number, frame in enumerate(frames) for data in parser.feed(frame)]
    record = RequestRecord(prompt_idx=0, category="", start_s=0.0)
    read_answer(Answer(status, events, body), record)
    return record


def test_only_frames_with_text_are_deliveries_and_usage_counts_the_tokens():
    record = read(*chat_frames("Hello", " world", num_tokens=4, num_prompt=9))
    assert record.frame_times_s == [1.0, 2.0]
    assert (record.num_output_tokens, record.num_prompt_tokens, record.num_frames, record.end_s) == (4, 9, 6, 5.0)
    assert record.frame_num_tokens == []


def test_an_answer_without_text_is_delivered_with_its_finish_reason():
    assert read(*chat_frames(num_tokens=1)).frame_times_s == [1.0]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (chat_frames("a")[:-1], r"without \[DONE\]"),
        ([], r"without \[DONE\]"),
        ([*chat_frames("a")[:2], event({"error": {"message": "engine died"}}), event(b"[DONE]")], "engine died"),
        ([*chat_frames("a")[:-2], event(b"[DONE]")], "no usage"),
        ([*chat_frames("a")[:2], event(b"[DONE]")], "finish reason"),
        ([event(b"{"), event(b"[DONE]")], "not JSON"),
        ([event({"choices": 5}), event(b"[DONE]")], "no chat completion chunk"),
    ],
)
def test_streams_that_failed(frames, message):
    with pytest.raises(StreamError, match=message):
        read(*frames)


@pytest.mark.parametrize(
    ("body", "message"),
    [(b'{"error": {"message": "queue full"}}', "HTTP 503: queue full"), (b"oops", "HTTP 503: oops"), (b"[]", r"HTTP 503: \[\]")],
)
def test_http_errors_carry_the_servers_words(body, message):
    with pytest.raises(StreamError, match=message):
        read(status=503, body=body)


def test_bodies():
    body = chat_body("hi", model="m", max_tokens=3, extra={"temperature": 0.5})
    assert body == (
        b'{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":3,"stream":true,'
        b'"stream_options":{"include_usage":true},"temperature":0.5}'
    )
