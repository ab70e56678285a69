"""The `medusa-server` command: options, the socket, and one process or several that answer on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys

from medusa_core.config import EngineConfig
from medusa_core.engine.client import EngineClient
from medusa_core.engine.logs import configure_logging
from medusa_core.engine.worker_client import DEFAULT_BUILD, WorkerClient
from medusa_core.errors import ConfigError, MedusaError
from server.app import create_app
from server.front_ends.manager import DEFAULT_TEXT_LOADER, FrontEndManager
from server.http_server import BACKLOG, CLOSE_TIMEOUT_S, DrainingServer, log_address, settle_memory, uvicorn_config
from server.serving import TextLoader, text_loader
from server.settings import PROGRAM, ServerSettings, load_settings

logger = logging.getLogger(__name__)

EXIT_USAGE = 2
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


def main() -> None:
    """Serve until a signal comes. Exits with 0 after a drain, 2 when an option or the model is wrong."""
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """`main` with its arguments and exit code as values."""
    settings = None
    try:
        settings = load_settings(arguments)
        config = settings.engine_config()
        # Each front end reads the keys for itself; what is wrong with them is said once, before anything starts.
        settings.keyring()
        if settings.api_workers > 1:
            return serve_with_front_ends(config, settings)
        client = WorkerClient(config, log_level=settings.log_level.upper(), log_format=settings.log_format)
        return serve(client, text_loader(settings), settings)
    except MedusaError as error:
        print_error(error, settings)
        return EXIT_USAGE


def serve(client: EngineClient, load_text: TextLoader, settings: ServerSettings) -> int:
    """Serve until a signal comes, then drain. Returns the exit code; raises MedusaError when the first load fails."""
    configure_logging(settings.log_level.upper(), settings.log_format)
    with listen(settings) as listener:
        return asyncio.run(_serve(client, load_text, settings, listener))


def serve_with_front_ends(
    config: EngineConfig, settings: ServerSettings, *, build: str = DEFAULT_BUILD, load_text: str = DEFAULT_TEXT_LOADER
) -> int:
    """As `serve`, with --api-workers processes that answer.

    build: as WorkerClient's. load_text: "module:function" that makes a text loader in each front end, called as function(settings).
    """
    configure_logging(settings.log_level.upper(), settings.log_format)
    with listen(settings) as listener:
        return asyncio.run(FrontEndManager(config, settings, listener, build=build, load_text=load_text).run())


async def _serve(client: EngineClient, load_text: TextLoader, settings: ServerSettings, listener: socket.socket) -> int:
    failures: list[BaseException] = []

    def on_load_end(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            failures.append(error)
            server.should_exit = True
            return
        settle_memory()

    app = create_app(client, load_text, settings, on_load_end=on_load_end)
    server = DrainingServer(uvicorn_config(app, settings), app.state.serving)
    log_address(listener)
    await server.serve(sockets=[listener])
    # Uvicorn skips the lifespan's end when it is forced, but the worker process must not outlive this one.
    if server.force_exit:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client.close(), CLOSE_TIMEOUT_S)
    # The first load failed: main prints the reason.
    if failures:
        raise failures[0]
    return 1 if server.force_exit else 0


def listen(settings: ServerSettings) -> socket.socket:
    """Bound before anything is loaded, so that a taken port is reported at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        message = f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}."
        raise ConfigError(message, hint="Choose another --host or --port.") from error
    # Connections inherit it. Without, the second frame of an answer waits for the client to acknowledge the first, which takes
    # 40 ms on a connection that is kept open; asyncio sets it only on sockets it has made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if settings.host not in LOOPBACK_HOSTS and not (settings.api_key or settings.api_key_file):
        logger.warning("Whoever reaches this port may use the server: there is neither --api-key nor --api-key-file.")
    return listener


def print_error(error: MedusaError, settings: ServerSettings | None = None) -> None:
    """One sentence for the person at the terminal, or for the machine that reads the log."""
    if settings is not None and settings.log_format == "json":
        configure_logging(settings.log_level.upper(), settings.log_format)
        logger.critical("%s", error)
    else:
        sys.stderr.write(f"{PROGRAM}: {error}\n")


if __name__ == "__main__":
    main()
