"""An engine in a thread of this process, for tests and the command line. A server uses worker_client."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future

from medusa_core.engine.core import EngineCore
from medusa_core.engine.loop import EngineLoop, FrontEndLostError
from medusa_core.engine.messages import Command, Event, Failed, Ready
from medusa_core.engine.streams import Streams
from medusa_core.errors import EngineDeadError, EngineError, EngineNotReadyError
from medusa_core.outputs import EngineInfo, EngineStats, TokenDelta
from medusa_core.request import EngineRequest

_FRONT_END = b""


class _ThreadTransport:
    """Commands through a thread-safe queue, events as callbacks on the caller's event loop (loop.Transport)."""

    def __init__(self, event_loop: asyncio.AbstractEventLoop, on_event: Callable[[Event], None]) -> None:
        self._event_loop = event_loop
        self._on_event = on_event
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.is_closed = False

    def put(self, command: Command) -> None:
        self._commands.put(command)

    def close(self) -> None:
        self.is_closed = True
        self._commands.put(None)  # wakes a blocked receive

    def receive(self, *, is_blocking: bool) -> list[tuple[bytes, Command]]:
        commands: list[tuple[bytes, Command]] = []
        try:
            while True:
                command = self._commands.get(block=is_blocking and not commands)
                if command is None:
                    return []
                commands.append((_FRONT_END, command))
        except queue.Empty:
            return commands

    def send(self, front_end: bytes, event: Event) -> None:
        try:
            self._event_loop.call_soon_threadsafe(self._on_event, event)
        except RuntimeError as error:
            raise FrontEndLostError("closed its event loop") from error


class InProcessClient:
    """An EngineClient whose step loop runs in a background thread, the only thread that ever touches the core.

    build: makes the core; runs in that thread too, because devices and some of torch's settings belong to a thread.
    """

    def __init__(self, build: Callable[[], EngineCore]) -> None:
        self._build = build
        self._streams = Streams()
        self._info: EngineInfo | None = None
        self._transport: _ThreadTransport | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> EngineInfo:
        """As EngineClient.start; what `build` raises comes out unchanged. May be called again after close."""
        if self._thread is not None:
            raise EngineError("The engine has been started already.", hint="Close it first.")
        transport = self._transport = _ThreadTransport(asyncio.get_running_loop(), self._on_event)
        outcome: Future[Ready] = Future()
        # A daemon, so that a program that forgets close() can still exit.
        self._thread = threading.Thread(
            target=_run_engine, args=(self._build, transport, outcome), name="medusa-engine", daemon=True
        )
        self._thread.start()
        try:
            ready = await asyncio.wrap_future(outcome)
        except BaseException:
            transport.close()
            self._thread = None
            raise
        self._info = ready.info
        self._streams.attach(transport.put, ready.stats)
        return ready.info

    async def close(self) -> None:
        """As EngineClient.close; waits for the step that is running."""
        self._streams.detach(EngineDeadError("The engine was closed."))
        if self._thread is not None and self._transport is not None:
            self._transport.close()
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineNotReadyError("The engine has not been started.", hint="Await start() first.")
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._streams.stats

    @property
    def num_open_requests(self) -> int:
        return self._streams.num_open

    @property
    def is_ready(self) -> bool:
        return self._streams.is_attached

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        return self._streams.generate(request)

    def generate_many(self, requests: Sequence[EngineRequest]) -> AsyncGenerator[list[TokenDelta], None]:
        return self._streams.generate_many(requests)

    async def abort(self, request_id: str, choice_idx: int | None = None) -> None:
        self._streams.abort(request_id, choice_idx)

    def _on_event(self, event: Event) -> None:
        self._streams.receive(event)
        if isinstance(event, Failed):
            # The loop has ended; unlike a worker process it is not restarted.
            self._streams.detach(EngineDeadError("The engine failed.", hint="Close and start it again."))


def _run_engine(build: Callable[[], EngineCore], transport: _ThreadTransport, outcome: Future[Ready]) -> None:
    if not outcome.set_running_or_notify_cancel():
        return  # start() was cancelled already; from here on it cannot cancel the future under us
    try:
        core = build()
    except BaseException as error:  # noqa: BLE001 - carried to start(), which raises it
        outcome.set_exception(error)
        return
    outcome.set_result(Ready(core.info, core.stats()))
    EngineLoop(core, transport).run()
