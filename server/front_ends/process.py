"""A front end's process: the HTTP app before an engine that the main process keeps.

Its stdin is a pipe: the main process writes a FrontEndSpec line and keeps the pipe open. End of file means that this process is no
longer wanted, or that the main process is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn, cast

import msgspec
import uvicorn

from medusa_core.engine.logs import configure_logging
from medusa_core.engine.messages import WireError
from medusa_core.engine.peer_client import PeerClient
from medusa_core.errors import MedusaError
from server.app import create_app
from server.front_ends.link import Link
from server.front_ends.messages import Drained, FrontEndSpec, LoadFailed
from server.front_ends.totals import families_of
from server.http_server import DrainingServer, settle_memory, until_idle, uvicorn_config
from server.serving import Serving, TextLoader
from server.settings import ServerSettings

logger = logging.getLogger(__name__)


def main() -> NoReturn:
    """Entry point of the process. Exits with 0 when told to stop, else with 1."""
    # Ctrl-C and a service manager's SIGTERM reach the whole process group; the main process says what is to be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=FrontEndSpec)
    threading.Thread(target=_exit_with_parent, args=(sys.stdin.fileno(),), name="parent-watch", daemon=True).start()
    settings = ServerSettings(**spec.settings)
    configure_logging(settings.log_level.upper(), settings.log_format)
    raise SystemExit(asyncio.run(_serve(spec, settings)))


async def _serve(spec: FrontEndSpec, settings: ServerSettings) -> int:
    client = PeerClient()
    link = Link(spec, client)
    failures: list[BaseException] = []

    def on_load_end(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is None:
            settle_memory()
            return
        if isinstance(error, MedusaError):
            link.send(LoadFailed(WireError.of(error)))
        else:
            logger.error("The text could not be loaded.", exc_info=error)
        failures.append(error)
        server.should_exit = True

    try:
        app = create_app(client, _import(spec.load_text)(settings), settings, on_load_end=on_load_end, siblings=link)
    except MedusaError as error:
        link.send(LoadFailed(WireError.of(error)))
        link.close()
        return 1
    serving: Serving = app.state.serving
    server = FrontEndServer(uvicorn_config(app, settings), serving, link)
    link.join(count=lambda: families_of(serving.registry.collect()), on_drain=server.drain, on_stop=server.stop)
    await server.serve([SharedListener(fileno=spec.listener_fd)])
    link.close()
    return 1 if failures or not serving.is_draining else 0


class SharedListener(socket.socket):
    """A listening socket that several processes accept from."""

    def listen(self, backlog: int = 0, /) -> None:
        """Does nothing: it listens already, with the main process's backlog. Here the backlog is how many connections asyncio
        accepts at a time, which is one, since a process that takes all there are would leave the others idle."""


class FrontEndServer(DrainingServer):
    """Drains and stops when the main process says so: signals are for that one, and all front ends answer until the last has
    drained."""

    def __init__(self, config: uvicorn.Config, serving: Serving, link: Link) -> None:
        config.backlog = 1
        super().__init__(config, serving)
        self._link = link

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield

    def drain(self) -> None:
        """Refuse new requests, and tell when those that run have ended."""
        if not self._serving.is_draining:
            self._serving.is_draining = True
            self._drain_task = asyncio.create_task(self._drain())

    def stop(self) -> None:
        """End `serve`."""
        self.should_exit = True

    async def _drain(self) -> None:
        await until_idle(self._serving)
        self._link.send(Drained())


def _import(path: str) -> Callable[[ServerSettings], TextLoader]:
    module_name, _, function_name = path.partition(":")
    return cast("Callable[[ServerSettings], TextLoader]", getattr(importlib.import_module(module_name), function_name))


def _exit_with_parent(spec_fd: int) -> None:
    """Ends the process when the main process closes the pipe or dies."""
    # Not through the file object, whose lock the interpreter wants when it ends.
    os.read(spec_fd, 1)
    os._exit(1)
