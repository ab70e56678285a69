"""A server of scripted bytes: each connection's requests are answered in turn by the next script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

# Pieces written one by one, with a pause between them so that they arrive apart; None closes the connection.
Script = list[bytes | None]


@dataclass
class StubServer:
    """requests: head and body of each, in order of arrival. num_connections: accepted so far."""

    answer: Callable[[int], Script]
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(line.split(":")[1]) for line in head.splitlines() if line.startswith("Content-Length")), 0)
                self.requests.append((head, await reader.readexactly(length)))
                for piece in self.answer(len(self.requests) - 1):
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.002)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Callable[[int], Script]) -> AsyncIterator[StubServer]:
    stub = StubServer(answer)
    server = await asyncio.start_server(stub._serve, "127.0.0.1", 0)
    stub.port = server.sockets[0].getsockname()[1]
    try:
        yield stub
    finally:
        server.close()


def chunked(*pieces: bytes) -> list[bytes]:
    """An event stream; each piece is one chunk."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


def plain(status: str, body: bytes, *headers: str) -> list[bytes]:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return ["\r\n".join(lines).encode() + b"\r\n\r\n" + body]


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chat_frames(*texts: str, num_tokens: int = 5, num_prompt: int = 7) -> list[bytes]:
    """Frames of a chat completion as our server and others send them."""
    return [
        event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
        *(event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}) for text in texts),
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        event({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": 12}}),
        event(b"[DONE]"),
    ]
