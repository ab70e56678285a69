"""What the engine's process logs, in the form that the server's options ask for."""

from __future__ import annotations

import json

import pytest

from medusa_core.engine.worker_client import WorkerClient
from medusa_core.errors import EngineError
from tests.engine.fake import POISON_TOKEN
from tests.engine.harness import FAKE_BUILD, collect, make_config, make_request


async def logged_by_a_failing_worker(capfd, **options) -> list[str]:
    client = WorkerClient(make_config(), build=FAKE_BUILD, restart_delays_s=(60,), **options)
    await client.start()
    with pytest.raises(EngineError):
        await collect(client, make_request("a", [POISON_TOKEN], max_tokens=2))
    await client.close()
    return capfd.readouterr().err.splitlines()


async def test_all_of_it_is_json(capfd):
    events = [json.loads(line) for line in await logged_by_a_failing_worker(capfd, log_format="json")]
    (failure,) = [event for event in events if "exc_info" in event]
    assert failure["level"] == "ERROR"
    assert failure["logger"] == "medusa_core.engine.loop"
    assert "RuntimeError: poisoned" in failure["exc_info"]


async def test_as_text_a_traceback_is_indented(capfd):
    lines = await logged_by_a_failing_worker(capfd)
    assert "    RuntimeError: poisoned" in lines
    assert "RuntimeError: poisoned" not in lines
