"""The `medusa-server` command: options, sockets, signals and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from medusa_core.engine.client import EngineClient
from medusa_core.engine.logs import adopt_library_logs, configure_logging
from medusa_core.engine.worker_client import WorkerClient
from medusa_core.errors import ConfigError, MedusaError
from medusa_core.outputs import EngineInfo
from medusa_core.text import TextProcessor, import_tokenizers
from server.app import create_app
from server.connection import connection_options
from server.serving import Serving, TextLoader
from server.settings import PROGRAM, ServerSettings, load_settings

logger = logging.getLogger(__name__)

# After the drain has waited for requests, connections get this long to close by themselves.
CLOSE_TIMEOUT_S = 1
DRAIN_POLL_S = 0.05
# New objects alive before the garbage collector looks at them; by default a few hundred or thousand, and each
# request in progress holds some.
# Streams make next to no cycles: what they make goes with its last reference, and looking at it was 4 % of this process's time.
GC_THRESHOLD = 50_000
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
        client = WorkerClient(config, log_level=settings.log_level.upper(), log_format=settings.log_format)
        return serve(client, text_loader(settings), settings)
    except MedusaError as error:
        print_error(error, settings)
        return EXIT_USAGE


def text_loader(settings: ServerSettings) -> TextLoader:
    """Loads tokenizer and chat template from the folder that the engine names."""

    def load(info: EngineInfo) -> TextProcessor:
        return TextProcessor.load(
            info.tokenizer_path, chat_template=settings.chat_template, trust_remote_code=settings.trust_remote_code
        )

    return load


def serve(client: EngineClient, load_text: TextLoader, settings: ServerSettings) -> int:
    """Serve until a signal comes, then drain. Returns the exit code; raises MedusaError when the first load fails."""
    configure_logging(settings.log_level.upper(), settings.log_format)
    with listen(settings) as listener:
        # Meanwhile the engine's process loads the model. What goes wrong here is told when the text is loaded.
        threading.Thread(target=_import_tokenizers, name="import-tokenizers", daemon=True).start()
        return asyncio.run(_serve(client, load_text, settings, listener))


async def _serve(client: EngineClient, load_text: TextLoader, settings: ServerSettings, listener: socket.socket) -> int:
    failures: list[BaseException] = []

    def on_load_end(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            failures.append(error)
            server.should_exit = True
            return
        # What is loaded stays. Walking all of it in each full collection would halt every stream for 0.1 s and more.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    app = create_app(client, load_text, settings, on_load_end=on_load_end)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        lifespan="on",
        **connection_options(settings),
    )
    server = DrainingServer(config, app.state.serving)
    host, port = listener.getsockname()[:2]
    logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    await server.serve(sockets=[listener])
    # Uvicorn skips the lifespan's end when it is forced, but the worker process must not outlive this one.
    if server.force_exit:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client.close(), CLOSE_TIMEOUT_S)
    # The first load failed: main prints the reason.
    if failures:
        raise failures[0]
    return 1 if server.force_exit else 0


def _import_tokenizers() -> None:
    with contextlib.suppress(ImportError):
        import_tokenizers()
        adopt_library_logs()


def listen(settings: ServerSettings) -> socket.socket:
    """Bound before anything is loaded, so that a taken port is reported at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        message = f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}."
        raise ConfigError(message, hint="Choose another --host or --port.") from error
    # Connections inherit it. Without, the second frame of an answer waits for the client to acknowledge the first, which takes
    # 40 ms on a connection that is kept open; asyncio sets it only on sockets it has made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if settings.host not in LOOPBACK_HOSTS and not (settings.api_key or settings.api_key_file):
        logger.warning("Whoever reaches this port may use the server: there is neither --api-key nor --api-key-file.")
    return listener


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
        deadline = self._loop.time() + self._serving.settings.drain_timeout_s
        while self._serving.num_active and self._loop.time() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        if self._serving.num_active:
            logger.warning("%d requests had not ended after --drain-timeout-s", self._serving.num_active)
        self.should_exit = True


def print_error(error: MedusaError, settings: ServerSettings | None = None) -> None:
    """One sentence for the person at the terminal, or for the machine that reads the log."""
    if settings is not None and settings.log_format == "json":
        configure_logging(settings.log_level.upper(), settings.log_format)
        logger.critical("%s", error)
    else:
        sys.stderr.write(f"{PROGRAM}: {error}\n")


if __name__ == "__main__":
    main()
