"""The worker killed, the server asked to stop. The last tests of the shared server: they end it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import MODEL, START_TIMEOUT_S, Server, ServerSlot, until

pytestmark = pytest.mark.demo

COMPLETIONS = "/v1/completions"
# One token per step and no end before max_tokens, so that the length of the text sets how long it takes.
STEADY = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "speculative": {"enabled": False}}


@contextmanager
def running_stream(server: Server, **fields: Any) -> Iterator[Iterator[str]]:
    """Lines of a stream of which some have come."""
    with server.http.stream("POST", COMPLETIONS, json={**STEADY, **fields, "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        for _ in range(3):
            next(lines)
        yield lines


def test_a_killed_worker_is_reported_and_replaced(server: Server):
    pid = server.worker_pid()
    with running_stream(server, max_tokens=20_000) as lines:
        os.kill(pid, signal.SIGKILL)
        *_, error, done = lines
    assert '"code":"engine_dead"' in error
    assert done == "data: [DONE]"
    health, ready = server.http.get("/health"), server.http.get("/ready")
    assert (health.status_code, ready.status_code) == (503, 503)
    refused = server.http.post(COMPLETIONS, json=STEADY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_not_ready")
    assert "retry-after" in refused.headers

    until(lambda: server.http.get("/ready").status_code == 200, timeout_s=START_TIMEOUT_S)
    assert server.http.get("/health").status_code == 200
    assert server.worker_pid() != pid
    assert server.text("1, 2, 3, 4, 5,", max_tokens=8).startswith(" 6, 7")
    assert server.until_idle().value("kv_cache_usage_perc") == 0


def test_sigterm_lets_a_running_stream_end(server: Server):
    check_drain(server, num_seconds=4)


@pytest.mark.long
def test_sigterm_lets_a_stream_of_25_seconds_end(slot: ServerSlot):
    server = slot.get()  # the only one without any option
    check_drain(server, num_seconds=25)


def check_drain(server: Server, *, num_seconds: float) -> None:
    num_tokens = max(16, int(num_seconds * steps_per_second(server)))
    with running_stream(server, max_tokens=num_tokens, stream_options={"include_usage": True}) as lines:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.http.get("/ready").status_code == 503)
        refused = server.http.post(COMPLETIONS, json=STEADY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
        assert "retry-after" in refused.headers
        *_, last, usage, done = lines
    assert '"finish_reason":"length"' in last
    assert f'"completion_tokens":{num_tokens}' in usage
    assert done == "data: [DONE]"
    assert server.process.wait(timeout=60) == 0
    with pytest.raises(httpx.ConnectError):
        server.http.get("/health")


def steps_per_second(server: Server) -> float:
    """Measured here and now, because a stream that takes long on one machine is over at once on another."""
    num_tokens = 24
    start = time.perf_counter()
    server.complete(STEADY["prompt"], max_tokens=num_tokens, ignore_eos=True, speculative={"enabled": False})
    return num_tokens / (time.perf_counter() - start)
