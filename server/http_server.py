"""The HTTP server of one process: uvicorn with a drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.connection import connection_options
from server.serving import Serving
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

# After the drain has waited for requests, connections get this long to close by themselves.
CLOSE_TIMEOUT_S = 1
DRAIN_POLL_S = 0.05
# Connections that may wait to be accepted.
BACKLOG = 2048
# New objects alive before the garbage collector looks at them; by default a few hundred or thousand, and each
# request in progress holds some.
# Streams make next to no cycles: what they make goes with its last reference, and looking at it was 4 % of this process's time.
_GC_THRESHOLD = 50_000


def uvicorn_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """Uvicorn's options, the same for any number of front ends."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        lifespan="on",
        **connection_options(settings),
    )


def log_address(listener: socket.socket) -> None:
    """Where the server can be reached."""
    host, port = listener.getsockname()[:2]
    logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)


def settle_memory() -> None:
    """To be called when the model is loaded. What is loaded stays: walking all of it in each full collection would halt every
    stream for 0.1 s and more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


class DrainingServer(uvicorn.Server):
    """Uvicorn, whose first signal starts a drain: it keeps answering until running requests have ended, then stops.

    New generation requests are refused meanwhile (`Serving.require_model`) and /ready is red. A second signal stops at once.
    """

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving
        self._drain_task: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Replaces uvicorn's handler, which would stop listening at once and raise the signal again at the end."""
        if self._serving.is_draining:
            self.should_exit = self.force_exit = True
        else:
            self._serving.is_draining = True
            self._loop.call_soon_threadsafe(self._start_drain, signal.Signals(sig).name)

    def _start_drain(self, signal_name: str) -> None:
        logger.info("%s: draining %d requests", signal_name, self._serving.num_active)
        self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await until_idle(self._serving)
        self.should_exit = True


async def until_idle(serving: Serving) -> None:
    """Until the last request has ended, or --drain-timeout-s is over."""
    event_loop = asyncio.get_running_loop()
    deadline = event_loop.time() + serving.settings.drain_timeout_s
    while serving.num_active and event_loop.time() < deadline:
        await asyncio.sleep(DRAIN_POLL_S)
    if serving.num_active:
        logger.warning("%d requests had not ended after --drain-timeout-s", serving.num_active)
