"""What a front end and an engine say to each other. Plain structs in one process, msgpack between two.

::

    front end ── Submit, Abort, Query ───────▶ engine loop      (commands)
    front end ◀── Outputs, Rejected, Failed ── engine loop      (events)

    parent ── WorkerSpec ────────────▶ worker process           (JSON line on its stdin)
    parent ◀── Ready or StartFailed ── worker process           (msgpack on its stdout, once)
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from medusa_core import errors
from medusa_core.config import EngineConfig
from medusa_core.engine.logs import LogFormat
from medusa_core.errors import EngineError, MedusaError, RequestError
from medusa_core.outputs import EngineInfo, EngineStats, TokenDelta
from medusa_core.request import EngineRequest


class WireError(msgspec.Struct, frozen=True, kw_only=True):
    """A MedusaError on its way to another process, where `rebuild` makes it the same class again.

    class_name: a class of medusa_core.errors (codes do not tell all classes apart).
    message: the full text, hint included.
    """

    class_name: str
    message: str
    hint: str | None = None
    param: str | None = None

    @classmethod
    def of(cls, error: MedusaError) -> WireError:
        """A subclass declared elsewhere crosses as its nearest base in medusa_core.errors, which the receiver is sure to have."""
        class_name = next(base.__name__ for base in type(error).__mro__ if getattr(errors, base.__name__, None) is base)
        param = error.param if isinstance(error, RequestError) else None
        return cls(class_name=class_name, message=str(error), hint=error.hint, param=param)

    def rebuild(self) -> MedusaError:
        """The exception `of` was given, in the nearest class that both processes know."""
        error_class: type[MedusaError] = getattr(errors, self.class_name)
        error = error_class(self.message)
        error.hint = self.hint
        if isinstance(error, RequestError):
            error.param = self.param
        return error


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Answered by Rejected, or by Outputs until each choice has a finish reason."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End one choice (None: all). Choices still open get a last delta; anything else is ignored."""

    request_id: str
    choice_idx: int | None = None


class Query(msgspec.Struct, frozen=True, tag=True):
    """Answered by Outputs without deltas, before the next step."""


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """All that one step emitted for one front end (possibly nothing), and the engine's counters after it."""

    deltas: list[TokenDelta]
    stats: EngineStats


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """A Submit was refused; nothing else will come for it."""

    request_id: str
    error: WireError


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Every live request of this front end has ended with `error`."""

    error: WireError


Command: TypeAlias = Submit | Abort | Query
Event: TypeAlias = Outputs | Rejected | Failed


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All a worker process needs to start.

    build: "module:function" called as function(config, progress=bool) -> EngineCore.
    folder: private to this worker and holds its socket; the worker removes it if its parent dies first.
    log_level: name of a level of the logging module. log_format: JSON comes without progress bars. num_starts: as
    outputs.EngineStats.
    """

    config: EngineConfig
    build: str
    folder: str
    log_level: str
    num_starts: int = 1
    log_format: LogFormat = "text"

    @property
    def address(self) -> str:
        """The ZeroMQ endpoint on which the worker listens."""
        return f"ipc://{self.folder}/engine"


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded and its socket is bound."""

    info: EngineInfo
    stats: EngineStats


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine refused to start; the worker exits."""

    error: WireError


StartOutcome: TypeAlias = Ready | StartFailed
# A StartOutcome comes through a pipe, behind its length as a big-endian integer of so many bytes.
LENGTH_BYTES = 4


def engine_failure() -> MedusaError:
    """What live requests end with when the engine's loop fails. The cause stays in the log: it may quote other requests."""
    return EngineError("The engine failed while it ran this request.", hint="Try again; the engine's log has the cause.")
