"""Whoever leaves frees what the engine holds for them; whoever stays is not disturbed."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from medusa_core.errors import EngineDeadError
from tests.server.fakes import FakeClient

BODY = {"model": "tiny", "prompt": ["Hi", "Ho"], "n": 2, "max_tokens": 50}


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_free_steps", [0, 2])
async def test_a_client_that_leaves_aborts_its_requests(make_server, stream, num_free_steps):
    client = FakeClient(gate=asyncio.Event(), num_free_steps=num_free_steps)
    url = await make_server(client)
    async with httpx.AsyncClient(base_url=url) as http:
        task = asyncio.create_task(http.post("/v1/completions", json={**BODY, "stream": stream}))
        await until(lambda: client.num_live == 2)
        await until(lambda: len(client.deltas) == 4 * num_free_steps)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: client.num_live == 0)
        assert {request_id for request_id, _ in client.aborted} == {request.request_id for request in client.requests}
        client.gate.set()
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert 'medusa_request_success_total{finished_reason="abort",model_name="tiny"} 4.0' in metrics


async def test_a_worker_that_dies_mid_stream_gives_an_error_frame_and_done(make_http):
    client = FakeClient(failure=EngineDeadError("The worker died."), num_free_steps=2)
    http = await make_http(client)
    response = await http.post("/v1/completions", json={**BODY, "stream": True})
    assert response.status_code == 200
    *frames, error, done, rest = response.text.split("\n\n")
    assert frames
    assert (done, rest) == ("data: [DONE]", "")
    error = json.loads(error[6:])["error"]
    assert error == {"message": "The worker died.", "type": "server_error", "param": None, "code": "engine_dead"}
    assert client.num_live == 0
    whole = await http.post("/v1/completions", json=BODY)
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_dead")


async def test_a_bug_mid_stream_gives_an_error_frame_and_done(make_http):
    http = await make_http(FakeClient(failure=ZeroDivisionError("secret"), num_free_steps=1))
    response = await http.post("/v1/completions", json={**BODY, "stream": True})
    *_, error, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(error[6:])["error"]["code"] == "internal_error"
    assert "secret" not in response.text


async def test_the_body_ends_with_done(make_server):
    url = await make_server(sse_ping_s=0.05)
    async with httpx.AsyncClient(base_url=url) as http:
        response = await http.post("/v1/completions", json={**BODY, "stream": True})
        assert response.content.endswith(b"data: [DONE]\n\n")
        # The connection is clean: it serves the next request.
        assert (await http.get("/health")).status_code == 200


async def test_pings_are_comments_and_off_by_default(make_server):
    for ping_s, has_pings in ((0.02, True), (0, False)):
        client = FakeClient(step_s=0.1)
        url = await make_server(client, sse_ping_s=ping_s)
        async with httpx.AsyncClient(base_url=url) as http:
            text = (await http.post("/v1/completions", json={**BODY, "stream": True, "max_tokens": 4})).text
        lines = [line for line in text.split("\n") if line and not line.startswith("data: ")]
        assert bool(lines) == has_pings
        assert all(line.startswith(":") for line in lines)
