"""The main process before several front ends: the engine, the front ends, signals and the drain."""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import signal
import socket
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from medusa_core.config import EngineConfig
from medusa_core.engine.messages import WireError
from medusa_core.engine.sockets import Router
from medusa_core.engine.supervisor import RestartDelays, describe_exit, python_command
from medusa_core.engine.worker_client import WorkerClient
from medusa_core.errors import EngineDeadError, EngineError
from server.front_ends.messages import (
    Acquire,
    Collect,
    Drained,
    FromFrontEnd,
    FrontEndSpec,
    Hello,
    Loaded,
    LoadFailed,
    Page,
    Scrape,
    Settle,
    Snapshot,
    State,
)
from server.front_ends.metrics_page import MetricsPage
from server.front_ends.shared_limits import SharedLimiter
from server.http_server import CLOSE_TIMEOUT_S, DRAIN_POLL_S, log_address
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

DEFAULT_TEXT_LOADER = "server.serving:text_loader"
# Before each restart of a front end. One that dies once is replaced at once: the others take its clients meanwhile.
RESTART_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# What a front end may take beyond the drain's time to say that it has drained, and beyond the connections' to end.
_GRACE_S = 2.0


@dataclass(eq=False)
class _FrontEnd:
    """name: that of its spec."""

    name: str
    process: Process
    is_connected: bool = False
    has_loaded: bool = False
    is_drained: bool = False

    async def kill(self) -> None:
        """End it, if it has not ended."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class FrontEndManager:
    """Serves with `settings.api_workers` front ends that accept from `listener`. `run` may be called once.

    build: as WorkerClient's. load_text: as FrontEndSpec's.
    """

    def __init__(
        self, config: EngineConfig, settings: ServerSettings, listener: socket.socket, *, build: str, load_text: str
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._load_text = load_text
        self._created = int(time.time())
        self._client = WorkerClient(
            config,
            build=build,
            log_level=settings.log_level.upper(),
            log_format=settings.log_format,
            on_change=self._on_engine_change,
        )
        self._page = MetricsPage(self._client, settings, self._collect)
        self._limiter = SharedLimiter()
        self._state = State()
        self._front_ends: dict[str, _FrontEnd] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until a signal comes, then drain. Returns the exit code; raises MedusaError when the first load fails."""
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        folder = tempfile.mkdtemp(prefix="medusa-")  # mode 0700: only this user can reach the socket in it
        self._address = f"ipc://{folder}/main"
        self._router = Router(self._address, FromFrontEnd, on_message=self._receive, on_failure=self._fail)
        for sig in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(sig, self._on_signal, sig)
        log_address(self._listener)
        try:
            self._start(self._start_engine(), on_failure=self._fail)
            for idx in range(self._settings.api_workers):
                self._start(self._keep_alive(idx), on_failure=self._fail)
            return await self._end
        finally:
            await self._close()
            shutil.rmtree(folder, ignore_errors=True)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(front_end.kill() for front_end in self._front_ends.values()), self._client.close())
        self._router.close()

    def _start(self, work: Coroutine[Any, Any, None], *, on_failure: Callable[[BaseException], None]) -> None:
        """Run it beside the rest."""

        def on_end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                on_failure(error)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(on_end)

    def _fail(self, error: BaseException) -> None:
        if not self._end.done():
            self._end.set_exception(error)

    def _finish(self, exit_code: int) -> None:
        if not self._end.done():
            self._end.set_result(exit_code)

    # The engine

    async def _start_engine(self) -> None:
        await self._client.start()

    def _on_engine_change(self, error: EngineDeadError | None) -> None:
        if error is not None:
            self._page.on_engine_down()
            self._change(address=None, error=WireError.of(error))
        else:
            client = self._client
            self._page.on_engine_up(client.info)
            self._change(info=client.info, address=client.worker_address, stats=client.stats, error=None)

    # The front ends

    async def _keep_alive(self, idx: int) -> None:
        delays = RestartDelays(RESTART_DELAYS_S)
        for num_starts in itertools.count():
            started_s = time.monotonic()
            name = f"{idx}-{num_starts}"
            end = await self._run_front_end(name)
            if self._state.is_draining:
                return
            if not self._state.is_open:
                # As with the engine: what is wrong with the options now will still be wrong later.
                raise EngineError(f"A front end died while it loaded ({end}).", hint="Its log has the cause.")
            logger.error("front end %s died (%s); restarting it", name, end)
            await asyncio.sleep(delays.next_s(ran_s=time.monotonic() - started_s))
            if self._state.is_draining:
                return

    async def _run_front_end(self, name: str) -> str:
        """From its start to its end. Returns what ended it."""
        try:
            front_end = await self._spawn(name)
        except OSError as error:
            return str(error)
        exit_code = await front_end.process.wait()
        del self._front_ends[name]
        self._page.forget(name)
        self._limiter.forget(name)
        return describe_exit(exit_code)

    async def _spawn(self, name: str) -> _FrontEnd:
        listener_fd = self._listener.fileno()
        spec = FrontEndSpec(
            name=name,
            listener_fd=listener_fd,
            address=self._address,
            settings=self._settings.model_dump(mode="json"),
            load_text=self._load_text,
            created=self._created,
            is_late=self._state.is_open,
        )
        command = python_command("server.front_ends.process")
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, pass_fds=(listener_fd,))
        front_end = self._front_ends[name] = _FrontEnd(name, process)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec) + b"\n")
        return front_end

    def _receive(self, name: str, message: FromFrontEnd) -> None:
        front_end = self._front_ends.get(name)
        if front_end is None:
            return  # it has died since
        match message:
            case Hello():
                front_end.is_connected = True
                self._router.send(name, self._state)
            case Loaded():
                front_end.has_loaded = True
                self._open_if_all_loaded()
            case LoadFailed():
                error = message.error.rebuild()
                logger.error("front end %s cannot serve: %s", name, error)
                if not self._state.is_open:
                    self._fail(error)
            case Drained():
                front_end.is_drained = True
            case Snapshot():
                self._page.receive(name, message)
            case Scrape():
                self._start(self._answer_scrape(name, message), on_failure=_log_failure)
            case Acquire():
                self._start(self._answer_acquire(name, message), on_failure=_log_failure)
            case Settle():
                self._limiter.settle(name, message)

    def _open_if_all_loaded(self) -> None:
        num_loaded = sum(front_end.has_loaded for front_end in self._front_ends.values())
        if not self._state.is_open and num_loaded == self._settings.api_workers:
            self._change(is_open=True)

    def _change(self, **fields: Any) -> None:
        self._state = msgspec.structs.replace(self._state, **fields)
        for front_end in self._connected():
            self._router.send(front_end.name, self._state)

    def _connected(self) -> list[_FrontEnd]:
        return [front_end for front_end in self._front_ends.values() if front_end.is_connected]

    # What must be one truth

    def _collect(self, collection_id: int) -> set[str]:
        names = {front_end.name for front_end in self._connected()}
        for name in names:
            self._router.send(name, Collect(collection_id))
        return names

    async def _answer_scrape(self, name: str, question: Scrape) -> None:
        self._router.send(name, Page(question.scrape_id, await self._page.render()))

    async def _answer_acquire(self, name: str, question: Acquire) -> None:
        # It may have died since it asked; what is taken now nobody would give back.
        if name in self._front_ends:
            self._router.send(name, await self._limiter.acquire(name, question))

    # The end

    def _on_signal(self, sig: signal.Signals) -> None:
        if self._state.is_draining:
            self._finish(1)
            return
        logger.info("%s: draining %d front ends", sig.name, len(self._front_ends))
        self._change(is_draining=True)
        self._start(self._drain(), on_failure=self._fail)

    async def _drain(self) -> None:
        await _until(
            lambda: all(front_end.is_drained for front_end in self._connected()),
            timeout_s=self._settings.drain_timeout_s + _GRACE_S,
        )
        self._change(is_stopping=True)
        await _until(lambda: not self._connected(), timeout_s=CLOSE_TIMEOUT_S + _GRACE_S)
        self._finish(0)


def _log_failure(error: BaseException) -> None:
    logger.error("a front end's question could not be answered", exc_info=error)


async def _until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Until it is true, or the time is over."""
    event_loop = asyncio.get_running_loop()
    deadline = event_loop.time() + timeout_s
    while not condition() and event_loop.time() < deadline:
        await asyncio.sleep(DRAIN_POLL_S)
