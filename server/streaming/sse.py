"""Frames of a stream: `data: {json}` and a blank line, `[DONE]` at the end, and the body closes at once after it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from typing import TypeAlias

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from medusa_core.errors import MedusaError
from server.disconnect import ClientGoneError, unless_gone
from server.errors import INTERNAL_ERROR, error_object
from server.generation import ChoiceUpdate, Generation, Updates
from server.protocol.common import encode
from server.protocol.responses import StreamEvent
from server.replies import Reply

logger = logging.getLogger(__name__)

# One or more frames that are ready at the same time, and whether they are the last.
Pieces: TypeAlias = AsyncGenerator[tuple[bytes, bool], None]

# A line that starts with a colon is a comment.
PING = b": ping\n\n"

_HEADERS = {
    "cache-control": "no-store",
    # Asks nginx to pass frames on as they come.
    "x-accel-buffering": "no",
}


def frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def frames(reply: Reply, generation: Generation, first: list[ChoiceUpdate], updates: Updates) -> Pieces:
    """The whole stream. The answer's status is sent already, so an error becomes a frame, then the end."""
    piece = b""
    try:
        piece = _join(reply.opening(generation.num_choices)) + _of(reply, first)
        if generation.is_open:
            yield piece, False
            piece = b""
        async for batch in updates:
            piece += _of(reply, batch)
            # Behind the end of the text nothing is waited for, so all that is left goes with it: a write of its own costs as much
            # as the rest of what a frame takes.
            if generation.is_open:
                yield piece, False
                piece = b""
        if reply.has_usage_chunk:
            piece += _join([reply.usage_chunk(generation.usage, generation.request_metrics)])
    except MedusaError as error:
        generation.error_code = error.code
        piece += _join(reply.failure(error_object(error)))
    # The last handler of a stream: nothing outside it could still tell the client.
    except Exception:
        logger.exception("A stream failed.")
        generation.error_code = INTERNAL_ERROR.code
        piece += _join(reply.failure(INTERNAL_ERROR))
    yield piece + reply.end, True


def _of(reply: Reply, updates: list[ChoiceUpdate]) -> bytes:
    return b"".join([_frame_of(chunk) for update in updates for chunk in reply.chunks(update)])


def _join(chunks: Iterable[msgspec.Struct]) -> bytes:
    return b"".join(map(_frame_of, chunks))


def _frame_of(chunk: msgspec.Struct) -> bytes:
    data = frame(encode(chunk))
    return b"event: " + chunk.type.encode() + b"\n" + data if isinstance(chunk, StreamEvent) else data


class TokenStream(Response):
    """An event stream that closes `updates`, and with them the engine's work, however the response ends.

    ping_s: seconds between comment lines that keep proxies from closing an idle connection; 0
    sends none.
    """

    media_type = "text/event-stream"

    def __init__(self, content: Pieces, updates: Updates, *, ping_s: float) -> None:
        # Not the base class's constructor, which declares the length of a body.
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._content = content
        self._updates = updates
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Both: closing a generator that never started does not reach the one it reads.
        async with aclosing(self._updates), aclosing(self._content):
            with suppress(ClientGoneError):
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = asyncio.create_task(_send_pings(send, self._ping_s)) if self._ping_s > 0 else None
        try:
            async for piece, is_last in self._content:
                # Pings end before the body does.
                if is_last and pings is not None:
                    pings.cancel()
                await send({"type": "http.response.body", "body": piece, "more_body": not is_last})
        finally:
            if pings is not None:
                pings.cancel()


async def _send_pings(send: Send, ping_s: float) -> None:
    # Between pieces of whole frames: each `send` writes its piece at once.
    while True:
        await asyncio.sleep(ping_s)
        await send({"type": "http.response.body", "body": PING, "more_body": True})
