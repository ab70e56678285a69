"""The one table from error classes to the status and words of HTTP answers, and the server's own request errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from medusa_core.errors import (
    CapacityError,
    ConfigError,
    DrainingError,
    EngineError,
    EngineNotReadyError,
    MedusaError,
    ModelError,
    RequestError,
)
from server.protocol.errors import ErrorObject


class UnknownParameterError(RequestError):
    """A field the API does not have."""

    code = "unknown_parameter"


class MalformedBodyError(RequestError):
    """The body is not a JSON object."""

    code = "invalid_json"


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"


class RequestTooLargeError(RequestError):
    """The body is larger than --max-body-bytes."""

    code = "request_too_large"


class RequestTimeoutError(RequestError):
    """The body did not come within --receive-timeout-s."""

    code = "request_timeout"


class RateLimitError(RequestError):
    """The API key has used up what it may."""

    code = "rate_limit_exceeded"


class CrossSiteError(RequestError):
    """A browser sent it for a page of another site."""

    code = "cross_site_request"


class InvalidAPIKeyError(RequestError):
    """The API key is missing or wrong."""

    code = "invalid_api_key"


# The client has gone; nobody reads the answer, but logs and metrics show the status.
CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True, slots=True)
class Answer:
    """How a class of errors is answered. `retry_after_s`: seconds after which a client may try again."""

    status: int
    type: str
    retry_after_s: int | None = None
    is_closing_connection: bool = False


INVALID_REQUEST = "invalid_request_error"
_SERVER = "server_error"

# A class without a row of its own uses the row of its nearest base.
ANSWERS: dict[type[MedusaError], Answer] = {
    RequestError: Answer(400, INVALID_REQUEST),
    InvalidAPIKeyError: Answer(401, INVALID_REQUEST),
    CrossSiteError: Answer(403, INVALID_REQUEST),
    ModelNotFoundError: Answer(404, INVALID_REQUEST),
    RequestTimeoutError: Answer(408, INVALID_REQUEST, is_closing_connection=True),
    RequestTooLargeError: Answer(413, INVALID_REQUEST),
    # Its retry-after is computed for each.
    RateLimitError: Answer(429, INVALID_REQUEST),
    CapacityError: Answer(503, _SERVER, retry_after_s=1),
    DrainingError: Answer(503, _SERVER, retry_after_s=5, is_closing_connection=True),
    EngineError: Answer(500, _SERVER),
    EngineNotReadyError: Answer(503, _SERVER, retry_after_s=5),
    ConfigError: Answer(500, _SERVER),
    ModelError: Answer(500, _SERVER),
}


def answer_for(error: MedusaError) -> Answer:
    """The row of the error's class, or of its nearest base that has one."""
    return next(ANSWERS[cls] for cls in type(error).__mro__ if cls in ANSWERS)


def is_refusal(error_class: type[MedusaError]) -> bool:
    """Whether such an error turns a request away: it is wrong, or there is no room for it now. The others are failures."""
    return issubclass(error_class, (RequestError, CapacityError, EngineNotReadyError))


def refusal_codes() -> list[str]:
    """Codes of all refusals there are, in alphabetical order."""
    return sorted({error_class.code for error_class in _subclasses(MedusaError) if is_refusal(error_class)})


def _subclasses(error_class: type[MedusaError]) -> Iterator[type[MedusaError]]:
    for subclass in error_class.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def error_object(error: MedusaError) -> ErrorObject:
    """What clients are told of it."""
    param = error.param if isinstance(error, RequestError) else None
    return ErrorObject(str(error), answer_for(error).type, param, error.code)


# For a bug; details stay in the log.
INTERNAL_ERROR = ErrorObject("The server had an internal error. See its log.", _SERVER, None, "internal_error")
