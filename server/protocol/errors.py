"""The error object: all four keys always, `code` a string or null."""

from __future__ import annotations

import msgspec


class ErrorObject(msgspec.Struct):
    """What went wrong. `param` names the field of the request, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorObject


def encode_error(message: str, *, type: str, param: str | None, code: str | None) -> bytes:
    """The JSON of an error, as the body of an answer or the data of a frame."""
    return msgspec.json.encode(ErrorBody(ErrorObject(message, type, param, code)))
