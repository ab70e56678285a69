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
