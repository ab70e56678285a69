"""The caller's side of an engine: one stream of deltas per live request. Both clients are made of it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable

from medusa_core.engine.messages import Abort, Command, Event, Failed, Outputs, Rejected, Submit
from medusa_core.errors import EngineNotReadyError, InvalidParameterError, MedusaError
from medusa_core.outputs import EngineStats, TokenDelta
from medusa_core.request import EngineRequest

Send = Callable[[Command], None]


class _Stream:
    """Deltas of one request between the engine and its reader. `num_open`: choices whose end has not arrived."""

    __slots__ = ("is_abandoned", "items", "num_open")

    def __init__(self, num_choices: int) -> None:
        self.items: asyncio.Queue[TokenDelta | MedusaError] = asyncio.Queue()
        self.num_open = num_choices
        self.is_abandoned = False


class Streams:
    """Routes events to the readers of live requests. Belongs to one event loop; detached until an engine is attached."""

    def __init__(self) -> None:
        self._send: Send | None = None
        self._streams: dict[str, _Stream] = {}
        self.stats = EngineStats()

    @property
    def is_attached(self) -> bool:
        return self._send is not None

    def attach(self, send: Send, stats: EngineStats) -> None:
        """An engine is ready; `send` must not block, and takes its commands in order."""
        self._send = send
        self.stats = stats

    def detach(self, error: MedusaError) -> None:
        """The engine is gone: every live request ends with `error`, and the counters start over with the next engine."""
        self._send = None
        self.stats = EngineStats()
        self._fail_all(error)

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        """As EngineClient.generate."""
        stream = self._open(request)
        try:
            num_open = request.params.n
            while num_open:
                item = await stream.items.get()
                if isinstance(item, MedusaError):
                    raise item
                num_open -= item.finish_reason is not None
                yield item
        finally:
            if self._streams.get(request.request_id) is stream:
                # The id stays taken until the engine confirms, so that a late delta cannot reach a new request of the same id.
                stream.is_abandoned = True
                self.abort(request.request_id)

    def abort(self, request_id: str, choice_idx: int | None = None) -> None:
        """As EngineClient.abort."""
        if self._send is not None and request_id in self._streams:
            self._send(Abort(request_id, choice_idx))

    def receive(self, event: Event) -> None:
        """Pass an event of the engine on to the readers it concerns."""
        match event:
            case Outputs():
                self.stats = event.stats
                for delta in event.deltas:
                    self._deliver(delta)
            case Rejected():
                stream = self._streams.pop(event.request_id, None)
                if stream is not None:
                    stream.items.put_nowait(event.error.rebuild())
            case Failed():
                self._fail_all(event.error.rebuild())

    def _open(self, request: EngineRequest) -> _Stream:
        if self._send is None:
            raise EngineNotReadyError("The engine is not running, or still loading.", hint="Try again when it is ready.")
        if request.request_id in self._streams:
            raise InvalidParameterError(
                f"request_id {request.request_id!r} belongs to a live request.", param="request_id", hint="Use a new one."
            )
        stream = self._streams[request.request_id] = _Stream(request.params.n)
        self._send(Submit(request))
        return stream

    def _deliver(self, delta: TokenDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return
        if not stream.is_abandoned:
            stream.items.put_nowait(delta)
        if delta.finish_reason is not None:
            stream.num_open -= 1
            if stream.num_open == 0:
                del self._streams[delta.request_id]

    def _fail_all(self, error: MedusaError) -> None:
        for stream in self._streams.values():
            stream.items.put_nowait(copy.copy(error))  # one each: a raised exception collects its raiser's traceback
        self._streams.clear()
