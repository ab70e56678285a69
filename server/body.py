"""Bytes of a request to a validated body, with bounded error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from medusa_core.errors import InvalidParameterError, RequestError, UnsupportedParameterError
from server.errors import MalformedBodyError, UnknownParameterError
from server.protocol.chat import ROLES
from server.protocol.common import Body
from server.protocol.responses import ITEM_TYPES

MAX_REPORTED_ERRORS = 10
MAX_REPORTED_CHARS = 200
# Above this many errors even listing them costs too much.
MAX_LISTED_ERRORS = 1000

B = TypeVar("B", bound=Body)

_ERROR_CLASSES: dict[str, type[RequestError]] = {
    "extra_forbidden": UnknownParameterError,
    "unsupported_parameter": UnsupportedParameterError,
}


async def read_body(request: Request, model: type[B], *, allow_unknown: bool) -> B:
    """The request's JSON object as `model`. Raises RequestError with code, message and the first wrong field."""
    return parse_body(await request.body(), model, allow_unknown=allow_unknown)


def parse_body(raw: bytes, model: type[B], *, allow_unknown: bool) -> B:
    """As `read_body`, from the bytes."""
    try:
        value = msgspec.json.decode(raw)
    # msgspec reports text that is not UTF-8, numbers out of range, NaN and Infinity as subclasses of ValueError.
    except ValueError as error:
        raise MalformedBodyError(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise MalformedBodyError("The body is nested too deeply.") from error
    if not isinstance(value, dict):
        raise MalformedBodyError(f"The body must be a JSON object, got {_describe(value)}.")
    return validate(value, model, allow_unknown=allow_unknown)


def validate(value: dict[str, Any], model: type[B], *, allow_unknown: bool) -> B:
    """As `read_body`, from what the bytes say."""
    try:
        return model.model_validate(value, extra="ignore" if allow_unknown else "forbid")
    except ValidationError as error:
        raise _as_request_error(error) from error


def _as_request_error(error: ValidationError) -> RequestError:
    count = error.error_count()
    if count > MAX_LISTED_ERRORS:
        return InvalidParameterError(f"The body has {count} wrong or unknown fields.")
    details = error.errors(include_url=False, include_context=False)
    sentences = [_sentence(detail) for detail in details[:MAX_REPORTED_ERRORS]]
    if count > MAX_REPORTED_ERRORS:
        sentences.append(f"{count - MAX_REPORTED_ERRORS} more errors follow.")
    error_class = _ERROR_CLASSES.get(details[0]["type"], InvalidParameterError)
    return error_class(" ".join(sentences), param=field_path(details[0]["loc"]))


def _sentence(detail: ErrorDetails) -> str:
    path = field_path(detail["loc"]) or "body"
    if detail["type"] == "extra_forbidden":
        return f"Unknown field {path}: remove it, or check its spelling."
    if detail["type"] == "missing":
        return f"{path}: this field is required."
    return f"{path}: {detail['msg'][:MAX_REPORTED_CHARS]}, got {_describe(detail['input'])}."


def field_path(loc: Sequence[int | str]) -> str | None:
    """`("messages", 0, "user", "content")` as `messages[0].content`: the role, or the item's type, is pydantic's name of the
    union's member."""
    path = ""
    previous: int | str = ""
    for item in loc:
        if isinstance(item, int):
            path += f"[{item}]"
        elif not (isinstance(previous, int) and item in (*ROLES, *ITEM_TYPES)):
            path += f".{item}" if path else item
        previous = item
    return path[:MAX_REPORTED_CHARS] or None


def _describe(value: Any) -> str:
    """A scalar as it is, shortened; a container by its kind and size."""
    match value:
        case dict():
            return f"an object of {len(value)} keys"
        case list():
            return f"a list of {len(value)}"
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value[:MAX_REPORTED_CHARS]) + ("..." if len(value) > MAX_REPORTED_CHARS else "")
        case int() if value.bit_length() > 128:
            return "an integer of more than 128 bits"
    return str(value)
