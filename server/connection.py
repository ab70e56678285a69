"""Connections that keep the server waiting: uvicorn's protocol with a deadline and a size limit for what is no body.

Uvicorn closes connections that are idle between requests, but waits for ever for the first byte of the first one or the rest of
one that has begun, and keeps as many headers and trailers as it is sent. The body's deadline is `BodyLimitMiddleware`'s.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.settings import ServerSettings

MAX_HEAD_BYTES = 65_536


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's headers take longer than `receive_timeout_s` or more than MAX_HEAD_BYTES.

    The rest of a body that has been refused meanwhile has as much time: a client that is still sending cannot read the answer. What
    stands around a body's chunks has as many bytes.
    """

    receive_timeout_s: float
    _deadline: asyncio.TimerHandle | None = None
    # Received since the last piece of a body, or the last request's end.
    _num_head_bytes = 0
    _is_in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn itself
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Also for blank lines, which are no request yet but end uvicorn's own patience between two.
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._start_deadline()
        self._num_head_bytes += len(data)
        super().data_received(data)
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
        self._is_in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._end_deadline()
        self._num_head_bytes = 0
        self._is_in_body = False
        super().on_message_complete()
        if self.cycle.response_complete:
            # The rest of a refused body has ended uvicorn's own.
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.receive_timeout_s, self.transport.abort)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def connection_options(settings: ServerSettings) -> dict[str, Any]:
    """Of `uvicorn.Config`."""
    protocol = type("Protocol", (BoundedProtocol,), {"receive_timeout_s": settings.receive_timeout_s})
    return {"http": protocol, "timeout_keep_alive": settings.keep_alive_timeout_s}
