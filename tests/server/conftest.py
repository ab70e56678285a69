"""A running app over a fake engine: in process for most tests, on a loopback port for those that need real connections."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import openai
import pytest
import uvicorn

from server.app import create_app
from server.connection import connection_options
from server.settings import ServerSettings
from tests.server.contract import Contract
from tests.server.fakes import FakeClient, FakeText


@pytest.fixture(autouse=True)
def _no_settings_from_the_shell(monkeypatch):
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"MEDUSA_{name.upper()}", raising=False)


@asynccontextmanager
async def _run_app(client, *, text=None, **options):
    app = create_app(client, lambda info: text or FakeText(), ServerSettings(**options))
    async with app.router.lifespan_context(app):
        if client.loading is None and client.load_error is None:
            while app.state.serving.model is None:
                await asyncio.sleep(0)
        yield app


@pytest.fixture
async def make_http():
    """`await make_http(FakeClient(), **options)`: an httpx client of the app; the app is its attribute `app`.

    Whatever a test asks for, the answer is as the app's OpenAPI document says.
    """
    async with AsyncExitStack() as stack:

        async def make(client=None, *, text=None, **options):
            app = await stack.enter_async_context(_run_app(client or FakeClient(), text=text, **options))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            contract = Contract(app.openapi())

            async def check(response):
                await response.aread()
                contract.check(response)

            hooks = {"response": [check]}
            http = httpx.AsyncClient(transport=transport, base_url="http://test", event_hooks=hooks)
            await stack.enter_async_context(http)
            http.app = app
            return http

        yield make


@pytest.fixture
async def make_server():
    """`await make_server(FakeClient(), **options)`: the base URL of the app served by uvicorn."""
    async with AsyncExitStack() as stack:

        async def make(client=None, *, text=None, **options):
            app = await stack.enter_async_context(_run_app(client or FakeClient(), text=text, **options))
            listener = socket.create_server(("127.0.0.1", 0))
            connections = connection_options(app.state.serving.settings)
            config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1, **connections)
            server = uvicorn.Server(config)
            server.capture_signals = _no_signals
            task = asyncio.create_task(server.serve(sockets=[listener]))

            async def stop():
                server.should_exit = True
                await task

            stack.push_async_callback(stop)
            while not server.started:
                await asyncio.sleep(0.01)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield make


@pytest.fixture
async def make_sdk(make_server):
    """`await make_sdk(FakeClient(), **options)`: the SDK's client of the app served by uvicorn; it validates answers strictly."""
    clients = []

    async def make(client=None, *, is_strict=True, **options):
        url = await make_server(client, **options)
        sdk = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="key",
            max_retries=0,
            _strict_response_validation=is_strict,
            http_client=httpx.AsyncClient(trust_env=False),
        )
        clients.append(sdk)
        return sdk

    yield make
    for sdk in clients:
        await sdk.close()


class _no_signals:
    """Uvicorn in a test must leave pytest's signal handlers alone."""

    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None
