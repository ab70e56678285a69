"""Connections that keep the server waiting: uvicorn's protocol with a deadline and limits for what is no body.

Uvicorn closes connections that are idle between requests, but waits for ever for the first byte of the first one or the rest of
one that has begun, and keeps as many headers, trailers and requests as it is sent. The body's deadline is `BodyLimitMiddleware`'s.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.settings import ServerSettings

MAX_HEAD_BYTES = 65_536
# Requests that wait for the answer to one before them. Nobody needs many, and one takes a hundred times the memory of its bytes.
MAX_REQUESTS_AHEAD = 8
# An offer to go on in another protocol, as Java's client makes with each request over plain HTTP.
# Whole lines: what is left of one that is cut would become part of the line before.
_UPGRADE = re.compile(rb"\r\n(?:upgrade|http2-settings):[^\r\n]*(?=\r\n)", re.IGNORECASE)


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's headers take longer than `receive_timeout_s` or more than MAX_HEAD_BYTES.

    The rest of a body that has been refused meanwhile has as much time: a client that is still sending cannot read the answer. What
    stands around a body's chunks has as many bytes.
    """

    receive_timeout_s: float
    max_body_bytes: int
    _deadline: asyncio.TimerHandle | None = None
    # Received since the last piece of a body, or the last request's end.
    _num_head_bytes = 0
    _is_in_body = False
    # Uvicorn's own `cycle` is the newest request, which may still wait for the answer to one before it.
    _answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn itself
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_deadline()
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Also for blank lines, which are no request yet but end uvicorn's own patience between two.
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._start_deadline()
        self._num_head_bytes += len(data)
        super().data_received(data if self._is_in_body else _without_upgrade(data))
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers may be dropped, and uvicorn would take them for headers.
        if not self._is_in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end_deadline()
        # Where the rest of a refused body came in the same piece.
        self._unset_keepalive_if_required()
        # What came in one piece with their end has not been counted yet.
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            raise ValueError("The headers are too large.")  # uvicorn answers 400 and closes the connection
        if len(self.pipeline) == MAX_REQUESTS_AHEAD:
            raise ValueError("Too many requests wait.")  # likewise
        if self.parser.should_upgrade():
            # The parser would pass the body over, and read it as the next request.
            raise ValueError("The offer of an upgrade came in pieces.")  # likewise
        self._is_in_body = True
        super().on_headers_complete()
        if self.pipeline:
            # Uvicorn reads no further while a request waits, and so would not notice that the client leaves.
            self.flow.resume_reading()
        else:
            self._answered = self.cycle

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)
        if self.pipeline:
            # As behind its headers. Nobody reads it yet, so nobody else looks at its size.
            if len(self.cycle.body) > self.max_body_bytes:
                raise ValueError("A body that waits is too large.")
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        self._end_deadline()
        self._num_head_bytes = 0
        self._is_in_body = False
        super().on_message_complete()
        if self.cycle.response_complete:
            # The rest of a refused body has ended uvicorn's own.
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        self._answered = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        if self._answered is not None and self._answered.response_started:
            self.transport.abort()  # A 400 would be read as part of the answer under way.
        else:
            super().send_400_response(msg)

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.receive_timeout_s, self.transport.abort)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _without_upgrade(data: bytes) -> bytes:
    """What came, without an offer of an upgrade among its first headers: a server may ignore it."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head + end[:2]) + end[2:] + rest


def connection_options(settings: ServerSettings) -> dict[str, Any]:
    """Of `uvicorn.Config`."""
    protocol = type(
        "Protocol", (BoundedProtocol,), {"receive_timeout_s": settings.receive_timeout_s, "max_body_bytes": settings.max_body_bytes}
    )
    # No route speaks WebSocket, whose protocols would take connections over without these bounds where such a package is installed.
    return {"http": protocol, "ws": "none", "timeout_keep_alive": settings.keep_alive_timeout_s}
