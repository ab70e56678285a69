"""Plain ASGI middleware: request ids, timing, metrics and the access log; body size."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_core.errors import MedusaError
from server.access_log import access_entry
from server.answers import error_response, internal_error_response
from server.errors import CLIENT_CLOSED_REQUEST, INTERNAL_ERROR, RequestTimeoutError, RequestTooLargeError, refusal_codes
from server.request_info import RequestInfo, route_path
from server.serving import Serving

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

# Accepted from clients; anything else is replaced, so that ids are safe in headers and logs.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Asked every few seconds by machines; logged at debug level so that the log shows people's requests.
_POLLED_ROUTES = frozenset({"/health", "/ready", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# A client that is still sending cannot read an answer, so a body that is refused is read to its end; up to this many bytes.
MAX_DISCARDED_BYTES = 64 * 1024 * 1024


class ObservabilityMiddleware:
    """Outermost: gives every answer its id and processing time, counts and logs it, and answers what nobody caught."""

    def __init__(self, app: ASGIApp, serving: Serving, paths: Collection[str]) -> None:
        """paths: of the app's routes, which a request that is refused before it gets to them may name."""
        self._app = app
        self._paths = frozenset(paths)
        self._serving = serving
        self._refusals = frozenset(refusal_codes())
        self._has_access_log = not serving.settings.no_access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        request_id = _request_id(scope)
        info = RequestInfo(request_id, start).attach(scope)
        status = 0

        # Not async itself, which would be one more coroutine for each frame of a stream.
        def send_with_headers(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.monotonic() - start) * 1000))
                headers["x-content-type-options"] = "nosniff"
                headers.update(info.headers)
            return send(message)

        self._serving.num_active += 1
        try:
            await self._app(scope, receive, send_with_headers)
        # The server's last handler: a bug in one request must not look like a broken connection.
        except Exception:
            logger.exception("Request %s failed.", request_id)
            if status:
                info.error_code = INTERNAL_ERROR.code
                raise
            await internal_error_response()(scope, receive, send_with_headers)
        finally:
            self._serving.num_active -= 1
            # Nothing was sent: the client, or the server's patience at the end of a drain, has gone.
            self._observe(scope, info, status or CLIENT_CLOSED_REQUEST)

    def _observe(self, scope: Scope, info: RequestInfo, status: int) -> None:
        # Unknown paths and methods share a label: clients must not be able to create time series.
        path = route_path(scope)
        route = getattr(scope.get("route"), "path", path if path in self._paths else "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        duration_s = time.monotonic() - info.arrival_s
        refusal = info.error_code if info.error_code in self._refusals else None
        self._serving.http_metrics.observe(method=method, route=route, status=status, duration_s=duration_s, refusal=refusal)
        if info.key_name is not None:
            self._serving.http_metrics.observe_key(info.key_name, status=status, num_tokens=info.num_charged_tokens)
        if self._serving.tracer is not None:
            self._serving.tracer.record(scope, info, route=route, status=status, duration_s=duration_s)
        level = logging.DEBUG if route in _POLLED_ROUTES else logging.INFO
        if self._has_access_log and access_logger.isEnabledFor(level):
            access_logger.log(level, access_entry(info, method=method, route=route, status=status, duration_s=duration_s))


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class BodyLimitMiddleware:
    """Answers 413 to bodies above `max_bytes`, whether or not their length is declared, and 408 to those that take too long."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _BoundedBody(receive, self._max_bytes, self._timeout_s)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self._max_bytes:
            error = await body.discard()
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, body.receive, send)


class _BoundedBody:
    """Receives a body within limits. Raises RequestTooLargeError and RequestTimeoutError."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._num_bytes = 0
        self._is_complete = False

    async def receive(self) -> Message:
        # What comes behind the body is the client's leaving, which may take its time.
        if self._is_complete:
            return await self._receive()
        message = await self._receive_in_time()
        if self._num_bytes > self._max_bytes:
            raise await self.discard()
        return message

    async def discard(self) -> MedusaError:
        """Receive a body that is too large to its end, as far as that is reasonable. Returns the error to be told."""
        try:
            while not self._is_complete and self._num_bytes <= MAX_DISCARDED_BYTES:
                await self._receive_in_time()
        except RequestTimeoutError as error:
            return error
        hint = "Send a shorter request, or start the server with a larger --max-body-bytes."
        return RequestTooLargeError(f"The body is larger than {self._max_bytes} bytes.", hint=hint)

    async def _receive_in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError as error:
            hint = "Send it faster, or start the server with a larger --receive-timeout-s."
            raise RequestTimeoutError(f"The body had not come after {self._timeout_s:g} seconds.", hint=hint) from error
        self._num_bytes += len(message.get("body", b""))
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message
