"""HTTP answers that are not generations: JSON that is encoded already, and errors."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from medusa_core.errors import MedusaError
from server.errors import INTERNAL_ERROR, INVALID_REQUEST, answer_for, error_object
from server.protocol.common import encode
from server.protocol.errors import ErrorBody, ErrorObject
from server.request_info import note_error

JSON = "application/json"


class ErrorResponse(Response):
    """An error object, whose code the request's log is told."""

    media_type = JSON

    def __init__(self, error: ErrorObject, *, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(encode(ErrorBody(error)), status_code=status, headers=headers)
        self._code = error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_error(scope, self._code)
        await super().__call__(scope, receive, send)


def error_response(error: MedusaError) -> Response:
    """The HTTP answer to an error, with `retry-after` where trying again can help."""
    answer = answer_for(error)
    headers = {}
    if answer.retry_after_s is not None:
        headers["retry-after"] = str(answer.retry_after_s)
    if answer.is_closing_connection:
        headers["connection"] = "close"
    if answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorResponse(error_object(error), status=answer.status, headers=headers)


def internal_error_response() -> Response:
    """The HTTP answer to a bug."""
    return ErrorResponse(INTERNAL_ERROR, status=500)


def http_error_response(status: int, message: str, *, code: str, headers: dict[str, str] | None = None) -> Response:
    """The HTTP answer to a failure of routing, which has no error class."""
    return ErrorResponse(ErrorObject(message, INVALID_REQUEST, None, code), status=status, headers=headers)


def json_response(body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response whose body is encoded already."""
    return Response(body, status, headers, JSON)
