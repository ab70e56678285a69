"""An app served from a thread, for tools that bring their own blocking clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from server.app import create_app
from server.connection import connection_options
from server.main import listen
from server.settings import ServerSettings
from tests.server.fakes import FakeClient, FakeText


@contextmanager
def serve_in_thread(client: FakeClient, **options) -> Iterator[str]:
    """The base URL of the app, which is ready."""
    settings = ServerSettings(port=0, **options)
    app = create_app(client, lambda info: FakeText(), settings)
    with listen(settings) as listener:
        config = uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=1, **connection_options(settings))
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            while httpx.get(f"{url}/ready", trust_env=False).status_code != 200:
                pass
            yield url
        finally:
            server.should_exit = True
            thread.join()
