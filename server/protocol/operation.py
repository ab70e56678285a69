"""`/health`, `/ready` and `/version`."""

from __future__ import annotations

import msgspec


class Status(msgspec.Struct):
    """`status` is for people; the HTTP status is for machines."""

    status: str


class Version(msgspec.Struct):
    version: str
