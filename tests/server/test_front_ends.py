"""Two HTTP processes before one engine process: whoever answers, it is one server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from medusa_core.config import EngineConfig, ModelConfig
from server.front_ends.manager import FrontEndManager
from server.front_ends.messages import State
from server.settings import ServerSettings
from tests.server.front_ends import Server, running
from tests.server.test_drain import BODY
from tests.server.test_metrics import scrape


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Each test leaves it as it was: ready, with two front ends and nothing to do."""
    with running(tmp_path_factory.mktemp("front-ends")) as server:
        yield server


@pytest.fixture
async def http(server):
    async with server.client() as http:
        yield http


async def until(condition):
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.05)


async def statuses(http, path):
    """Answers over many connections at once, of which each process gets some."""
    return {response.status_code for response in await asyncio.gather(*(http.get(path) for _ in range(16)))}


async def is_ready(http):
    return await statuses(http, "/ready") == {200}


async def is_draining(http):
    return await statuses(http, "/ready") == {503}


async def is_idle(http):
    return (await scrape(http))["medusa_num_requests_running"] == 0


def grown(before, after, *key):
    key = key if len(key) > 1 else key[0]
    return after[key] - before[key]


async def test_all_answer_alike(http):
    for path in ("/v1/models", "/version", "/health"):
        assert len({response.text for response in await asyncio.gather(*(http.get(path) for _ in range(16)))}) == 1


async def test_streams_of_both_are_counted_together(server, http):
    before = await scrape(http)
    tasks = await server.start_in_both(http)
    assert (await scrape(http))["medusa_num_requests_running"] == len(tasks)
    for lines in await asyncio.gather(*tasks):
        assert lines[-1] == "data: [DONE]"
    after = await scrape(http)
    assert after["medusa_num_requests_running"] == 0
    assert grown(before, after, "medusa_generation_tokens_total") == len(tasks) * BODY["max_tokens"]
    assert grown(before, after, "medusa_request_success_total", "finished_reason", "length") == len(tasks)
    assert grown(before, after, "medusa_time_to_first_token_seconds_count") == len(tasks)
    assert grown(before, after, "medusa_e2e_request_latency_seconds_bucket", "le", "+Inf") == len(tasks)

    # counted behind the answer's last byte
    async def are_counted():
        key = ("medusa_http_requests_total", "route", "/v1/completions")
        return (await scrape(http)).get(key, 0) - before.get(key, 0) == len(tasks)

    await until(are_counted)


async def test_a_client_that_leaves_frees_its_lane(http):
    before = await scrape(http)
    async with http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 5000, "stream": True}) as response:
        lines = response.aiter_lines()  # which closes the response when it is dropped
        await anext(lines)
        assert (await scrape(http))["medusa_num_requests_running"] == 1
    await until(lambda: is_idle(http))
    assert grown(before, await scrape(http), "medusa_request_success_total", "finished_reason", "abort") == 1


async def test_a_killed_front_end_takes_only_its_own_requests_along_and_is_replaced(server, http):
    (await http.post("/v1/completions", json=BODY)).raise_for_status()
    tasks = await server.start_in_both(http)
    before = await scrape(http)
    victim, other = server.front_ends
    num_lost = server.num_connections(victim)
    engine = server.engine
    os.kill(victim, signal.SIGKILL)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(end, httpx.TransportError) for end in ends) == num_lost
    assert all(end[-1] == "data: [DONE]" for end in ends if not isinstance(end, Exception))
    await until(lambda: is_idle(http))
    after = await scrape(http)
    counters = [key for key in before if str(key[0] if isinstance(key, tuple) else key).endswith(("_total", "_count", "_bucket"))]
    assert len(counters) > 50
    assert [key for key in counters if after[key] < before[key]] == []
    # The replacement takes its share of the connections.
    for task in await server.start_in_both(http):
        assert (await task)[-1] == "data: [DONE]"
    assert len(server.front_ends) == 2
    assert victim not in server.front_ends
    assert other in server.front_ends
    assert (await scrape(http))["medusa_front_ends"] == 2
    assert server.engine == engine
    assert await is_ready(http)


async def test_a_killed_engine_turns_all_unready_until_it_is_back(server, http):
    front_ends = server.front_ends
    before = await scrape(http)
    tasks = await server.start_in_both(http)
    os.kill(server.engine, signal.SIGKILL)
    for lines in await asyncio.gather(*tasks):
        assert lines[-1] == "data: [DONE]"
        assert '"code":"engine_dead"' in lines[-2]
    assert await statuses(http, "/health") == {503}
    for response in await asyncio.gather(*(http.post("/v1/completions", json=BODY) for _ in range(8))):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_not_ready")
        assert response.headers["retry-after"]
    after = await scrape(http)
    assert after["medusa_num_requests_running"] == 0
    assert (before["medusa_engine_up"], after["medusa_engine_up"]) == (1, 0)
    assert grown(before, after, "medusa_request_success_total", "finished_reason", "error") == len(tasks)
    await until(lambda: is_ready(http))
    assert (await scrape(http))["medusa_engine_up"] == 1
    assert server.front_ends == front_ends
    for lines in await asyncio.gather(*await server.start_in_both(http)):
        assert lines[-1] == "data: [DONE]"


async def test_a_front_end_that_hangs_is_counted_as_it_was(server, http):
    await asyncio.gather(*await server.start_in_both(http))
    before = await scrape(http)
    hanging, _ = server.front_ends
    os.kill(hanging, signal.SIGSTOP)
    try:
        values = await scrape(http)
    finally:
        os.kill(hanging, signal.SIGCONT)
    assert values["medusa_generation_tokens_total"] == before["medusa_generation_tokens_total"]
    assert (before["medusa_front_ends"], values["medusa_front_ends"]) == (2, 1)
    assert values["medusa_front_ends_wanted"] == 2
    # A rate tells of now, which nobody knows of one that hangs.
    assert 0 < values["medusa_tokens_per_second"] < before["medusa_tokens_per_second"]


@pytest.mark.long
async def test_limits_of_a_key_hold_over_all_and_end_with_who_used_them(tmp_path):
    headers = {"authorization": "Bearer secret"}
    with running(tmp_path, "delay=0.01", "--api-key", "alice=secret", "--key-parallel-requests", "12") as server:
        async with server.client(headers=headers) as http:
            tasks = [asyncio.create_task(http.post("/v1/completions", json={**BODY, "max_tokens": 400})) for _ in range(12)]

            async def are_running():
                return (await scrape(http))["medusa_num_requests_running"] == 12

            await until(are_running)
            # they may all have come to one
            other, victim = sorted(server.front_ends, key=server.num_connections)
            num_lost = server.num_connections(victim)
            assert server.num_connections(other) == 12 - num_lost
            refusals = await asyncio.gather(*(http.post("/v1/completions", json=BODY) for _ in range(8)))
            assert {response.status_code for response in refusals} == {429}
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(0.2)
            answers = await asyncio.gather(*(http.post("/v1/completions", json=BODY) for _ in range(num_lost)))
            assert {response.status_code for response in answers} == {200}
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(end, httpx.TransportError) for end in ends) == num_lost


async def test_a_drain_loses_no_stream_of_either(tmp_path):
    with running(tmp_path) as server:
        async with server.client() as http:
            tasks = await server.start_in_both(http)
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: is_draining(http))
            refused = await http.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
            for lines in await asyncio.gather(*tasks):
                assert lines[-1] == "data: [DONE]"
                assert '"finish_reason":"length"' in lines[-2]
            assert await server.exit_code() == 0


async def test_none_starts_once_the_server_drains(monkeypatch, tmp_path):
    config = EngineConfig(model=ModelConfig(model=str(tmp_path)))
    manager = FrontEndManager(config, ServerSettings(api_workers=2), None, build="", load_text="")
    manager._state = State(is_open=True)
    started = []

    async def dies(name):
        started.append(name)
        assert len(started) < 3
        return "exit code 1"

    async def drains_meanwhile(_):
        manager._state = State(is_open=True, is_draining=True)

    monkeypatch.setattr(manager, "_run_front_end", dies)
    monkeypatch.setattr(asyncio, "sleep", drains_meanwhile)
    await manager._keep_alive(0)
    assert started == ["0-0"]


@pytest.mark.long
async def test_a_second_signal_ends_all_at_once_and_with_1(tmp_path):
    with running(tmp_path, "delay=30") as server:
        async with server.client() as http:
            task = asyncio.create_task(http.post("/v1/completions", json=BODY))
            pids = [*server.front_ends, server.engine]
            await asyncio.sleep(0.3)
            server.process.send_signal(signal.SIGINT)
            await until(lambda: is_draining(http))
            server.process.send_signal(signal.SIGINT)
            assert await server.exit_code() == 1
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.long
async def test_the_drain_gives_up_after_its_timeout(tmp_path):
    with running(tmp_path, "delay=30", "--drain-timeout-s", "0.2") as server:
        async with server.client() as http:
            task = asyncio.create_task(http.post("/v1/completions", json=BODY))
            await asyncio.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            assert await server.exit_code() == 0
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.long
async def test_nothing_outlives_the_main_process(tmp_path):
    with running(tmp_path) as server:
        pids = [*server.front_ends, server.engine]
        server.process.kill()
        server.process.wait()

        async def are_gone():
            return not any(map(is_running, pids))

        await until(are_gone)


def is_running(pid):
    """A zombie that nobody reaps, as its parent is gone, has ended."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.long
@pytest.mark.parametrize(
    ("behaviour", "template", "message"),
    [
        ("refuse", "", "medusa-server: The heads are for another model. Use the right ones."),
        ("", "broken", "medusa-server: --chat-template is broken. Mend it."),
        ("", "bug", "medusa-server: A front end died while it loaded (exit code 1). Its log has the cause."),
    ],
)
async def test_a_failed_first_load_is_one_sentence_and_code_2(tmp_path, behaviour, template, message):
    server = Server(tmp_path / "log", behaviour, "--api-workers", "2", "--chat-template", template)
    assert await server.exit_code() == 2
    assert message in server.log.read_text().splitlines()


@pytest.mark.long
async def test_logs_of_all_processes_are_json(tmp_path):
    server = Server(tmp_path / "log", "refuse", "--api-workers", "2", "--log-format", "json")
    assert await server.exit_code() == 2
    events = [json.loads(line) for line in server.log.read_text().splitlines()]
    loggers = {event["logger"] for event in events}
    assert {"server.http_server", "medusa_core.engine.worker", "server.main"} <= loggers
