"""An engine in a process of its own, as a server uses it: supervised, restarted, and never in the way of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import msgspec
import zmq

from medusa_core.config import EngineConfig
from medusa_core.engine.logs import LogFormat
from medusa_core.engine.messages import Command, Event, Ready
from medusa_core.engine.streams import Streams
from medusa_core.engine.supervisor import DEFAULT_RESTART_DELAYS_S, Supervisor, WorkerProcess, describe_exit
from medusa_core.errors import EngineDeadError, EngineNotReadyError
from medusa_core.outputs import EngineInfo, EngineStats, TokenDelta
from medusa_core.request import EngineRequest

logger = logging.getLogger(__name__)

DEFAULT_BUILD = "medusa_core.engine.build:build_engine"


class _Connection:
    """A DEALER socket to one worker. Each worker gets a fresh one, so nothing meant for a dead worker reaches its successor."""

    def __init__(self, address: str, streams: Streams) -> None:
        self._streams = streams
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        # No limits: what can pile up is bounded by the live requests, and neither side may ever wait for the other.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        # zmq.asyncio would do, at four times the work per message.
        self._event_loop = asyncio.get_running_loop()
        self._may_have_messages = asyncio.Event()
        self._event_loop.add_reader(self._socket.FD, self._may_have_messages.set)
        self._receiver = asyncio.create_task(self._receive(), name="medusa-receiver")
        self._receiver.add_done_callback(self._on_receiver_end)

    def send(self, command: Command) -> None:
        self._socket.send(self._encode(command))  # without a limit it is queued at once; there is nothing to wait for
        # The descriptor tells of a message once, and sending may have swallowed that.
        self._may_have_messages.set()

    def close(self) -> None:
        self._event_loop.remove_reader(self._socket.FD)
        self._receiver.cancel()
        self._context.destroy(linger=0)

    async def _receive(self) -> None:
        self._may_have_messages.set()
        while True:
            await self._may_have_messages.wait()
            self._may_have_messages.clear()
            # All there is, before any reader runs: one that is behind then takes the deltas of several steps at once.
            with contextlib.suppress(zmq.Again):
                while True:
                    self._streams.receive(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))

    def _on_receiver_end(self, task: asyncio.Task[None]) -> None:
        """Without its reader a connection is useless: live requests end with an error instead of waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("the connection to the engine process failed", exc_info=error)
            self._streams.detach(EngineDeadError("The connection to the engine process failed.", hint="Restart the server."))


class WorkerClient:
    """An EngineClient over a worker process that it starts, restarts and ends.

    build: "module:function" that makes the core in the worker, called as function(config, progress=bool).
    log_level, log_format: the worker's; it logs to this process's stderr.
    restart_delays_s: seconds before each restart; the last one repeats for ever.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        build: str = DEFAULT_BUILD,
        log_level: str = "INFO",
        log_format: LogFormat = "text",
        restart_delays_s: Sequence[float] = DEFAULT_RESTART_DELAYS_S,
    ) -> None:
        self._streams = Streams()
        self._info: EngineInfo | None = None
        self._connection: _Connection | None = None
        self._worker_pid: int | None = None
        self._supervisor = Supervisor(
            config,
            build=build,
            log_level=log_level,
            log_format=log_format,
            on_up=self._on_up,
            on_down=self._on_down,
            restart_delays_s=restart_delays_s,
        )

    async def start(self) -> EngineInfo:
        """As EngineClient.start. Cancelling it ends the worker. May be called again after close."""
        await self._supervisor.start()
        return self.info

    async def close(self) -> None:
        """As EngineClient.close."""
        await self._supervisor.close()
        self._disconnect(EngineDeadError("The engine was closed."))

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineNotReadyError("The engine has not loaded yet.", hint="Await start() first.")
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._streams.stats

    @property
    def is_ready(self) -> bool:
        return self._streams.is_attached

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker that serves now, for logs and for tests that kill it."""
        return self._worker_pid

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        return self._streams.generate(request)

    def generate_many(self, requests: Sequence[EngineRequest]) -> AsyncGenerator[list[TokenDelta], None]:
        return self._streams.generate_many(requests)

    async def abort(self, request_id: str, choice_idx: int | None = None) -> None:
        self._streams.abort(request_id, choice_idx)

    def _on_up(self, worker: WorkerProcess, ready: Ready) -> None:
        logger.info("engine process %d is ready", worker.pid)
        self._info = ready.info
        self._worker_pid = worker.pid
        self._connection = _Connection(worker.address, self._streams)
        self._streams.attach(self._connection.send, ready.stats)

    def _on_down(self, exit_code: int) -> None:
        self._disconnect(
            EngineDeadError(f"The engine process died ({describe_exit(exit_code)}).", hint="It is being restarted; try again soon.")
        )

    def _disconnect(self, error: EngineDeadError) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._worker_pid = None
        self._streams.detach(error)
