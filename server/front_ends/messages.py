"""What the main process and its front ends say to each other, as msgpack; and the options that a front end gets, as a JSON line."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from medusa_core.engine.messages import WireError
from medusa_core.outputs import EngineInfo, EngineStats
from server.limits import Allowance, KeyLimits


class FrontEndSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All a front end needs to start.

    name: unique among those that ever run. listener_fd: inherited descriptor of the listening socket. address: ZeroMQ endpoint of
    the main process. settings: ServerSettings as plain data. load_text: "module:function" called as function(settings), which gives
    a serving.TextLoader. created, is_late: as in serving.Siblings.
    """

    name: str
    listener_fd: int
    address: str
    settings: dict[str, Any]
    load_text: str
    created: int
    is_late: bool


class State(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How things are; sent to a front end that says Hello, and to all at each change.

    info: of the engine, known from its first start on. address: where it takes requests; None while it is down. stats: its
    counters when it came up. error: what requests end with that ran when it went down. is_open: every front end has loaded, so
    requests are taken. is_stopping: the drain has ended.
    """

    info: EngineInfo | None = None
    address: str | None = None
    stats: EngineStats = EngineStats()
    error: WireError | None = None
    is_open: bool = False
    is_draining: bool = False
    is_stopping: bool = False


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Answered by a Snapshot with the same id."""

    collection_id: int


class Page(msgspec.Struct, frozen=True, tag=True):
    """The answer to a Scrape."""

    scrape_id: int
    page: bytes


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of a front end."""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """This front end can serve."""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """This front end cannot serve, and ends."""

    error: WireError


class Drained(msgspec.Struct, frozen=True, tag=True):
    """No request is left, or the time for them is over."""


class Sample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One line of /metrics."""

    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric with all its lines. type: as in Prometheus' text format."""

    name: str
    documentation: str
    type: str
    samples: list[Sample]


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """What a front end has counted. collection_id: None if nobody had asked."""

    collection_id: int | None
    families: list[Family]


class Scrape(msgspec.Struct, frozen=True, tag=True):
    """Asks for what /metrics says of all; answered by a Page with the same id."""

    scrape_id: int


class Acquire(msgspec.Struct, frozen=True, tag=True):
    """As RateLimiter.acquire; answered by Admitted."""

    acquire_id: int
    key_name: str
    limits: KeyLimits


class Admitted(msgspec.Struct, frozen=True, tag=True):
    """The answer to an Acquire."""

    question: Acquire
    allowance: Allowance


class Settle(msgspec.Struct, frozen=True, tag=True):
    """As RateLimiter.settle."""

    key_name: str
    limits: KeyLimits
    num_tokens: int


ToFrontEnd: TypeAlias = State | Collect | Page | Admitted
FromFrontEnd: TypeAlias = Hello | Loaded | LoadFailed | Drained | Snapshot | Scrape | Acquire | Settle
