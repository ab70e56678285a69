"""What the engine's process logs, in the form that the server's options ask for."""

from __future__ import annotations

import json

import pytest

from medusa_core.engine.worker_client import WorkerClient
from medusa_core.errors import EngineError
from tests.engine.fake import POISON_TOKEN
from tests.engine.harness import FAKE_BUILD, collect, make_config, make_request


async def test_all_of_it_is_json(capfd):
    client = WorkerClient(make_config(), build=FAKE_BUILD, restart_delays_s=(60,), log_format="json")
    await client.start()
    with pytest.raises(EngineError):
        await collect(client, make_request("a", [POISON_TOKEN], max_tokens=2))
    await client.close()
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (failure,) = [event for event in events if "exc_info" in event]
    assert (failure["level"], failure["logger"]) == ("ERROR", "medusa_core.engine.loop")
    assert "RuntimeError: poisoned" in failure["exc_info"]
    assert "a library that prints must not disturb the start" in [event["message"] for event in events]
