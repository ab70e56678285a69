"""The loop that owns an engine core: commands in, steps, events out. The same for a thread and for a process."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from typing import Protocol

import msgspec

from medusa_core.engine.core import EngineCore
from medusa_core.engine.messages import Abort, Command, Event, Failed, Outputs, Query, Rejected, Submit, WireError, engine_failure
from medusa_core.errors import CapacityError, InvalidParameterError, RequestError
from medusa_core.outputs import TokenDelta

logger = logging.getLogger(__name__)


class FrontEndLostError(Exception):
    """A front end is gone or has stopped reading; its requests are aborted."""


class Transport(Protocol):
    """How commands reach the loop and events leave it. Front ends are named by an opaque identity."""

    @property
    def is_closed(self) -> bool:
        """True ends the loop before its next step."""
        ...

    def receive(self, *, is_blocking: bool) -> list[tuple[bytes, Command]]:
        """Every command that has arrived. If blocking, waits for one; may still return without any."""
        ...

    def send(self, front_end: bytes, event: Event) -> None:
        """Never blocks. Raises FrontEndLostError."""
        ...


class _Route(msgspec.Struct):
    """Where the deltas of a live request go. `num_open`: choices without a finish reason."""

    front_end: bytes
    request_id: str
    num_open: int


class EngineLoop:
    """Steps a core for any number of front ends.

    Request ids are unique per front end only, so the core sees them prefixed with the front end's identity.
    """

    def __init__(self, core: EngineCore, transport: Transport) -> None:
        self._core = core
        self._transport = transport
        self._routes: dict[str, _Route] = {}
        # live requests of each front end that has any
        self._num_live: Counter[bytes] = Counter()

    def run(self) -> bool:
        """Run until the transport is closed (True) or the engine fails (False); then the live requests have been told."""
        try:
            while not self._transport.is_closed:
                self._turn()
        except Exception:
            logger.exception("the engine failed with %d live requests", len(self._routes))
            self._fail()
            return False
        return True

    def _fail(self) -> None:
        for front_end in list(self._num_live):
            with contextlib.suppress(FrontEndLostError):
                self._transport.send(front_end, Failed(WireError.of(engine_failure())))

    def _turn(self) -> None:
        deltas: list[TokenDelta] = []
        for front_end, command in self._transport.receive(is_blocking=not self._core.has_work):
            match command:
                case Submit():
                    self._submit(front_end, command)
                case Abort():
                    deltas += self._core.abort(_core_id(front_end, command.request_id), command.choice_idx)
                case Query():
                    self._send(front_end, Outputs([], self._core.stats()))
        if self._core.has_work:
            deltas += self._core.step()
        self._publish(deltas)

    def _submit(self, front_end: bytes, command: Submit) -> None:
        request = command.request
        core_id = _core_id(front_end, request.request_id)
        try:
            if core_id in self._routes:
                raise InvalidParameterError(f"request_id {request.request_id!r} belongs to a live request.", param="request_id")
            self._core.submit(msgspec.structs.replace(request, request_id=core_id))
        except (RequestError, CapacityError) as error:
            self._send(front_end, Rejected(request.request_id, WireError.of(error)))
        else:
            self._routes[core_id] = _Route(front_end, request.request_id, request.params.n)
            self._num_live[front_end] += 1

    def _publish(self, deltas: list[TokenDelta]) -> None:
        """One message per step to each front end with live requests, even without deltas, so that its counters are fresh."""
        batches: dict[bytes, list[TokenDelta]] = {front_end: [] for front_end in self._num_live}
        for delta in deltas:
            route = self._routes.get(delta.request_id)
            if route is None:
                continue  # of a front end that is gone
            batches[route.front_end].append(msgspec.structs.replace(delta, request_id=route.request_id))
            if delta.finish_reason is not None:
                route.num_open -= 1
                if route.num_open == 0:
                    self._forget(delta.request_id)
        stats = self._core.stats()
        for front_end, batch in batches.items():
            self._send(front_end, Outputs(batch, stats))

    def _send(self, front_end: bytes, event: Event) -> None:
        try:
            self._transport.send(front_end, event)
        except FrontEndLostError as error:
            self._drop(front_end, str(error))

    def _drop(self, front_end: bytes, reason: str) -> None:
        core_ids = [core_id for core_id, route in self._routes.items() if route.front_end == front_end]
        logger.warning("front end %s %s; aborting its %d requests", front_end.hex(), reason, len(core_ids))
        for core_id in core_ids:
            self._forget(core_id)
            self._core.abort(core_id)

    def _forget(self, core_id: str) -> None:
        front_end = self._routes.pop(core_id).front_end
        self._num_live[front_end] -= 1
        if self._num_live[front_end] == 0:
            del self._num_live[front_end]


def _core_id(front_end: bytes, request_id: str) -> str:
    return f"{front_end.hex()}/{request_id}"
