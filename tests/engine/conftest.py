"""Clients over the fake engine; every behaviour test runs against both kinds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from medusa_core.engine.client import EngineClient
from tests.engine.harness import make_config, make_in_process_client, make_worker_client

MakeClient = Callable[..., EngineClient]
StartClient = Callable[..., Awaitable[EngineClient]]


@pytest.fixture(params=["in_process", "worker"])
def make_client(request: pytest.FixtureRequest) -> MakeClient:
    """make_client(behaviour, **scheduler options) -> a client that has not been started."""
    make = {"in_process": make_in_process_client, "worker": make_worker_client}[request.param]
    return lambda behaviour="", **scheduler: make(make_config(behaviour, **scheduler))


@pytest.fixture
async def start_client(make_client: MakeClient) -> AsyncIterator[StartClient]:
    """As make_client, but started, and closed at the end of the test."""
    clients = []

    async def start(behaviour: str = "", **scheduler: int) -> EngineClient:
        client = make_client(behaviour, **scheduler)
        clients.append(client)
        await client.start()
        return client

    yield start
    for client in clients:
        await client.close()
