"""An engine in a process of its own, as a server uses it: supervised, restarted, and never in the way of the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from medusa_core.config import EngineConfig
from medusa_core.engine.logs import LogFormat
from medusa_core.engine.messages import Ready
from medusa_core.engine.peer_client import PeerClient
from medusa_core.engine.supervisor import DEFAULT_RESTART_DELAYS_S, Supervisor, WorkerProcess, describe_exit
from medusa_core.errors import EngineDeadError
from medusa_core.outputs import EngineInfo

logger = logging.getLogger(__name__)

DEFAULT_BUILD = "medusa_core.engine.build:build_engine"


class WorkerClient(PeerClient):
    """An EngineClient over a worker process that it starts, restarts and ends.

    build: "module:function" that makes the core in the worker, called as function(config, progress=bool).
    log_level, log_format: the worker's; it logs to this process's stderr.
    restart_delays_s: seconds before each restart; the last one repeats for ever.
    on_change: called when a worker has become ready, and with an error when it has died.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        build: str = DEFAULT_BUILD,
        log_level: str = "INFO",
        log_format: LogFormat = "text",
        restart_delays_s: Sequence[float] = DEFAULT_RESTART_DELAYS_S,
        on_change: Callable[[EngineDeadError | None], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._worker: WorkerProcess | None = None
        self._on_change = on_change
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
        self._worker = None
        await super().close()

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker that serves now, for logs and for tests that kill it."""
        return self._worker.pid if self._worker is not None else None

    @property
    def worker_address(self) -> str | None:
        """Where further clients can connect to the worker that serves now. No two workers have the same."""
        return self._worker.address if self._worker is not None else None

    def _on_up(self, worker: WorkerProcess, ready: Ready) -> None:
        logger.info("engine process %d is ready", worker.pid)
        self._worker = worker
        self.learn(ready.info)
        self.connect(worker.address, ready.stats)
        self._on_change(None)

    def _on_down(self, exit_code: int) -> None:
        self._worker = None
        error = EngineDeadError(
            f"The engine process died ({describe_exit(exit_code)}).", hint="It is being restarted; try again soon."
        )
        self.disconnect(error)
        self._on_change(error)
