"""Starting a worker process, and keeping one alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence

import msgspec

from medusa_core.config import EngineConfig
from medusa_core.engine.environment import ENGINE_ENVIRONMENT
from medusa_core.engine.logs import LogFormat
from medusa_core.engine.messages import LENGTH_BYTES, Ready, StartFailed, StartOutcome, WorkerSpec
from medusa_core.errors import EngineError, MedusaError

logger = logging.getLogger(__name__)

DEFAULT_RESTART_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# A process that ran this long was healthy.
_HEALTHY_AFTER_S = 60.0
_STOP_TIMEOUT_S = 5.0


def python_command(module: str) -> tuple[str, ...]:
    """Runs `main` of a module in a fresh interpreter that imports what this one imports, and nothing from the current folder (-P).

    Not multiprocessing's spawn, which would import the parent's main module, with all of the web server, into a worker.
    """
    bootstrap = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"
    return (sys.executable, "-P", "-c", bootstrap, *sys.path)


class RestartDelays:
    """How long to wait before the next start of a process that dies: longer and longer, the last delay for ever."""

    def __init__(self, delays_s: Sequence[float]) -> None:
        self._delays_s = delays_s
        self._num_failures = 0

    def next_s(self, *, ran_s: float) -> float:
        """ran_s: how long the process had run. After a minute it was healthy, and the delays start over."""
        if ran_s > _HEALTHY_AFTER_S:
            self._num_failures = 0
        delay_s = self._delays_s[min(self._num_failures, len(self._delays_s) - 1)]
        self._num_failures += 1
        return delay_s


class WorkerProcess:
    """A running worker process and its private folder."""

    def __init__(self, process: Process, spec: WorkerSpec) -> None:
        self._process = process
        self._spec = spec

    @classmethod
    async def spawn(
        cls, config: EngineConfig, *, build: str, log_level: str, log_format: LogFormat = "text", num_starts: int = 1
    ) -> WorkerProcess:
        """Start the process; `ready` tells when it can be used. num_starts: how often there has been one, this one included."""
        folder = tempfile.mkdtemp(prefix="medusa-")  # mode 0700: only this user can reach the socket in it
        spec = WorkerSpec(
            config=config, build=build, folder=folder, log_level=log_level, log_format=log_format, num_starts=num_starts
        )
        try:
            command = python_command("medusa_core.engine.worker")
            environment = ENGINE_ENVIRONMENT | os.environ
            process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(process, spec)

    @property
    def address(self) -> str:
        return self._spec.address

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> Ready:
        """Hand over the options and wait until the engine is loaded.

        Raises what the engine's build raised, or EngineError with the exit code if the process died without a word.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(self._spec) + b"\n")
        with contextlib.suppress(ConnectionError):  # it died already: the empty outcome below says so
            await self._process.stdin.drain()
        try:
            # Not up to the end of the stream: uvloop leaves the worker a second handle of its own end, so that none would come.
            length = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "big")
            payload = await self._process.stdout.readexactly(length)
        except asyncio.IncompleteReadError as error:
            exit_code = await self.wait()
            raise EngineError(
                f"The engine process died while it loaded ({describe_exit(exit_code)}).", hint="Its log has the cause."
            ) from error
        outcome: StartOutcome = msgspec.msgpack.decode(payload, type=StartOutcome)
        if isinstance(outcome, StartFailed):
            raise outcome.error.rebuild()
        return outcome

    async def wait(self) -> int:
        """Wait for the process to end. Returns its exit code, negative for a signal."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End the process, by force if need be, and remove its folder. Harmless on a dead one."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            # Not wait_for: Python 3.11's loses a cancellation that coincides with the end of what it waits for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
            shutil.rmtree(self._spec.folder, ignore_errors=True)
        await self._process.wait()


class Supervisor:
    """Keeps one worker alive: when it dies, another is started after a delay that grows while that keeps happening.

    on_up: called with each worker that is ready; on_down: with its exit code when it has died. Not called after `close`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        build: str,
        log_level: str,
        log_format: LogFormat = "text",
        on_up: Callable[[WorkerProcess, Ready], None],
        on_down: Callable[[int], None],
        restart_delays_s: Sequence[float] = DEFAULT_RESTART_DELAYS_S,
    ) -> None:
        self._config = config
        self._build = build
        self._log_level = log_level
        self._log_format = log_format
        self._on_up = on_up
        self._on_down = on_down
        self._restart_delays = RestartDelays(restart_delays_s)
        self._num_starts = 0
        self._worker: WorkerProcess | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the first worker. It is not retried: what is wrong with the options now will still be wrong later."""
        if self._task is not None:
            raise EngineError("The engine has been started already.", hint="Close it first.")
        self._worker = await self._launch()
        self._task = asyncio.create_task(self._keep_alive(self._worker), name="medusa-supervisor")

    async def close(self) -> None:
        """Stop supervising, then stop the worker."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._worker is not None:
            await self._worker.stop()
            self._worker = None

    async def _launch(self) -> WorkerProcess:
        self._num_starts += 1
        worker = await WorkerProcess.spawn(
            self._config,
            build=self._build,
            log_level=self._log_level,
            log_format=self._log_format,
            num_starts=self._num_starts,
        )
        try:
            ready = await worker.ready()
        except BaseException:
            await worker.stop()
            raise
        self._on_up(worker, ready)
        return worker

    async def _keep_alive(self, worker: WorkerProcess) -> None:
        while True:
            started_s = time.monotonic()
            exit_code = await worker.wait()
            self._on_down(exit_code)
            await worker.stop()
            logger.error("the engine process died (%s); restarting it", describe_exit(exit_code))
            worker = self._worker = await self._relaunch(ran_s=time.monotonic() - started_s)

    async def _relaunch(self, *, ran_s: float) -> WorkerProcess:
        """Try until a worker is ready."""
        while True:
            await asyncio.sleep(self._restart_delays.next_s(ran_s=ran_s))
            try:
                return await self._launch()
            except (MedusaError, OSError) as error:
                logger.error("the engine process could not be restarted: %s", error)
                ran_s = 0.0


def describe_exit(exit_code: int) -> str:
    """For logs and errors: "exit code 3", "signal 9"."""
    return f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
