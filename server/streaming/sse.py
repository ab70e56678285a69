"""Frames of a stream: `data: {json}` and a blank line, `[DONE]` at the end, and the body closes at once after it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from medusa_core.errors import MedusaError
from server.errors import error_body, internal_error_body
from server.generation import ChoiceUpdate, Generation
from server.protocol.common import encode
from server.replies import Reply

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def frames(
    reply: Reply,
    generation: Generation,
    first: ChoiceUpdate,
    updates: AsyncGenerator[ChoiceUpdate, None],
    *,
    has_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The whole stream. The answer's status is sent already, so an error becomes a frame, then `[DONE]`."""
    try:
        for chunk in reply.opening(generation.num_choices):
            yield frame(encode(chunk))
        for chunk in reply.chunks(first):
            yield frame(encode(chunk))
        async for update in updates:
            for chunk in reply.chunks(update):
                yield frame(encode(chunk))
        if has_usage:
            yield frame(encode(reply.usage_chunk(generation.usage)))
    except MedusaError as error:
        yield frame(error_body(error))
    # The last handler of a stream: nothing outside it could still tell the client.
    except Exception:
        logger.exception("A stream failed.")
        yield frame(internal_error_body())
    yield DONE


class TokenStream(EventSourceResponse):
    """An event stream that closes `updates`, and with them the engine's work, however the response ends.

    ping_s: seconds between comment lines that keep proxies from closing an idle connection; 0 sends none.
    """

    def __init__(self, content: AsyncGenerator[bytes, None], updates: AsyncGenerator[ChoiceUpdate, None], *, ping_s: float) -> None:
        super().__init__(content, ping=ping_s, sep="\n")
        self._content = content
        self._updates = updates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Both: closing a generator that never started does not reach the one it reads.
        async with aclosing(self._updates), aclosing(self._content):
            await super().__call__(scope, receive, send)
