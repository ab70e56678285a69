"""The caller's side of an engine: the deltas of live requests, on their way to who reads them. Both clients are made of it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing

from medusa_core.engine.messages import Abort, Command, Event, Failed, Outputs, Query, Rejected, Submit
from medusa_core.errors import EngineNotReadyError, InvalidParameterError, MedusaError
from medusa_core.outputs import EngineStats, TokenDelta
from medusa_core.request import EngineRequest

Send = Callable[[Command], None]


class _Inbox:
    """What has arrived for one reader. It takes everything at once, so however far it falls behind, it is woken once.

    What comes behind an error is dropped: it belongs to requests that end with it.
    """

    __slots__ = ("_deltas", "_error", "_waiter")

    def __init__(self) -> None:
        self._deltas: list[TokenDelta] = []
        self._error: MedusaError | None = None
        # Of the one reader, while it waits; an asyncio.Event keeps a queue of them, which takes twice as long.
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: TokenDelta) -> None:
        if self._error is None:
            self._deltas.append(delta)
            self._wake()

    def put_error(self, error: MedusaError) -> None:
        if self._error is None:
            self._error = error
            self._wake()

    async def take(self) -> tuple[list[TokenDelta], MedusaError | None]:
        """The deltas before the first error, and that error."""
        if not self._deltas and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        deltas, self._deltas = self._deltas, []
        return deltas, self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Stream:
    """One live request. `num_open`: choices whose end has not arrived. A reader of several requests has one inbox for them."""

    __slots__ = ("inbox", "is_abandoned", "num_open")

    def __init__(self, num_choices: int, inbox: _Inbox) -> None:
        self.inbox = inbox
        self.num_open = num_choices
        self.is_abandoned = False


class Streams:
    """Routes events to the readers of live requests. Belongs to one event loop; detached until an engine is attached."""

    def __init__(self) -> None:
        self._send: Send | None = None
        self._streams: dict[str, _Stream] = {}
        self._refreshers: list[asyncio.Future[None]] = []
        self.stats = EngineStats()

    @property
    def is_attached(self) -> bool:
        return self._send is not None

    @property
    def num_open(self) -> int:
        """Requests whose end has not arrived."""
        return len(self._streams)

    def attach(self, send: Send, stats: EngineStats) -> None:
        """An engine is ready; `send` must not block, and takes its commands in order."""
        self._send = send
        self.stats = stats

    def detach(self, error: MedusaError) -> None:
        """The engine is gone: every live request ends with `error`, and the counters start over with the next engine."""
        self._send = None
        self.stats = EngineStats()
        self._end_refresh()
        self._fail_all(error)

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        """As EngineClient.generate."""
        async with aclosing(self.generate_many([request])) as batches:
            async for batch in batches:
                for delta in batch:
                    yield delta

    async def generate_many(self, requests: Sequence[EngineRequest]) -> AsyncGenerator[list[TokenDelta], None]:
        """As EngineClient.generate_many."""
        inbox = _Inbox()
        streams: dict[str, _Stream] = {}
        try:
            for request in requests:
                streams[request.request_id] = self._open(request, inbox)
            num_open = sum(request.params.n for request in requests)
            while num_open:
                deltas, error = await inbox.take()
                for delta in deltas:
                    if delta.finish_reason is not None:
                        num_open -= 1
                if deltas:
                    yield deltas
                if error is not None:
                    raise error
        finally:
            for request_id, stream in streams.items():
                if self._streams.get(request_id) is stream:
                    # The id stays taken until the engine confirms, so that a late delta cannot reach a new request of the same id.
                    stream.is_abandoned = True
                    self.abort(request_id)

    def abort(self, request_id: str, choice_idx: int | None = None) -> None:
        """As EngineClient.abort."""
        if self._send is not None and request_id in self._streams:
            self._send(Abort(request_id, choice_idx))

    async def refresh(self) -> None:
        """As PeerClient.refresh."""
        if self._send is not None:
            refresher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._refreshers.append(refresher)
            self._send(Query())
            await refresher

    def receive(self, event: Event) -> None:
        """Pass an event of the engine on to the readers it concerns."""
        match event:
            case Outputs():
                self.stats = event.stats
                self._end_refresh()
                for delta in event.deltas:
                    self._deliver(delta)
            case Rejected():
                stream = self._streams.pop(event.request_id, None)
                if stream is not None:
                    stream.inbox.put_error(event.error.rebuild())
            case Failed():
                self._fail_all(event.error.rebuild())

    def _open(self, request: EngineRequest, inbox: _Inbox) -> _Stream:
        if self._send is None:
            raise EngineNotReadyError("The engine is not running, or still loading.", hint="Try again when it is ready.")
        if request.request_id in self._streams:
            raise InvalidParameterError(
                f"request_id {request.request_id!r} belongs to a live request.", param="request_id", hint="Use a new one."
            )
        stream = self._streams[request.request_id] = _Stream(request.params.n, inbox)
        self._send(Submit(request))
        return stream

    def _deliver(self, delta: TokenDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return
        if not stream.is_abandoned:
            stream.inbox.put(delta)
        if delta.finish_reason is not None:
            stream.num_open -= 1
            if stream.num_open == 0:
                del self._streams[delta.request_id]

    def _end_refresh(self) -> None:
        for refresher in self._refreshers:
            if not refresher.done():
                refresher.set_result(None)
        self._refreshers.clear()

    def _fail_all(self, error: MedusaError) -> None:
        for stream in self._streams.values():
            stream.inbox.put_error(copy.copy(error))  # one each: a raised exception collects its raiser's traceback
        self._streams.clear()
