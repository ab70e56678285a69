"""Logs: the line per request, the two formats, and that nothing a client sends can forge or leak through them."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys

import httpx
import pytest

from medusa_core.engine.logs import TextFormatter, json_formatter
from medusa_core.errors import EngineDeadError, QueueFullError
from tests.server.fakes import FakeClient
from tests.server.test_completions import post

BODY = {"model": "tiny", "prompt": "Hi"}


@pytest.fixture
def entries(caplog):
    """What the access log was told, as dicts, oldest first."""
    caplog.set_level(logging.INFO, logger="server.access")
    return lambda: [record.msg for record in caplog.records if record.name == "server.access"]


async def test_a_line_tells_tokens_speculation_and_times(make_http, entries):
    client = FakeClient()
    http = await make_http(client, api_key=("alice=one",))
    headers = {"x-request-id": "abc", "authorization": "Bearer one"}
    answer = (await http.post("/v1/completions", json=BODY, headers=headers)).json()
    (entry,) = entries()
    assert (entry["method"], entry["route"], entry["status"], entry["request_id"]) == ("POST", "/v1/completions", 200, "abc")
    assert (entry["key"], entry["model"], entry["finish_reasons"]) == ("alice", "tiny", ["stop"])
    usage, speculation = answer["usage"], answer["metrics"]["speculative_decoding"]
    assert entry["prompt_tokens"] == usage["prompt_tokens"]
    assert entry["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 2
    assert entry["completion_tokens"] == usage["completion_tokens"]
    assert entry["drafts"] == speculation["num_spec_steps"]
    assert entry["accepted_tokens"] == speculation["num_accepted_draft_tokens"]
    assert entry["mean_acceptance_length"] == speculation["mean_acceptance_length"]
    assert entry["queue_ms"] == 10
    assert entry["ttft_ms"] <= entry["duration_ms"]
    assert "error" not in entry


async def test_several_choices_are_summed(make_http, entries):
    client = FakeClient()
    await post(await make_http(client), n=3, prompt=["Hi", "Ho"])
    (entry,) = entries()
    assert entry["finish_reasons"] == ["stop"] * 6
    drafted = [delta for delta in client.deltas if delta.num_draft_nodes]
    assert entry["drafts"] == len(drafted)
    assert entry["accepted_tokens"] == sum(delta.num_accepted for delta in drafted)


@pytest.mark.parametrize(
    ("client", "change", "status", "error", "reasons"),
    [
        (FakeClient(), {"temperature": 9}, 400, "invalid_value", None),
        (FakeClient(), {"model": "other\nPOST /v1/forged 200"}, 404, "model_not_found", None),
        (FakeClient(refusal=QueueFullError("Full.")), {}, 503, "server_overloaded", None),
        (FakeClient(failure=EngineDeadError("Dead.")), {}, 500, "engine_dead", ["error"]),
        (FakeClient(failure=EngineDeadError("Dead."), num_free_steps=1), {"stream": True}, 200, "engine_dead", ["error"]),
        (FakeClient(failure=RuntimeError("A bug."), num_free_steps=1), {"stream": True}, 200, "internal_error", ["error"]),
    ],
)
async def test_refused_and_failed_requests_say_why(make_http, entries, client, change, status, error, reasons):
    response = await (await make_http(client)).post("/v1/completions", json={**BODY, **change})
    assert response.status_code == status
    (entry,) = entries()
    assert (entry["status"], entry["error"], entry.get("finish_reasons")) == (status, error, reasons)
    assert "forged" not in str(entry)
    assert "A bug." not in response.text


async def test_clients_that_left_are_seen(make_server, entries):
    client = FakeClient(gate=asyncio.Event(), num_free_steps=1)
    url = await make_server(client)
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        async with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            await response.aiter_bytes().__anext__()
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/completions", json=BODY, timeout=0.1)
    while len(entries()) < 2:
        await asyncio.sleep(0.01)
    streamed, whole = entries()
    assert (streamed["status"], streamed["finish_reasons"], streamed["completion_tokens"]) == (200, ["abort"], 1)
    assert (whole["status"], whole["finish_reasons"]) == (499, ["abort"])


async def test_machines_that_poll_are_not_logged_and_the_log_can_be_off(make_http, entries):
    http = await make_http()
    for path in ("/health", "/ready", "/metrics"):
        await http.get(path)
    assert not entries()
    await post(await make_http(no_access_log=True))
    assert not entries()


async def test_no_log_holds_a_prompt_an_answer_or_a_key(make_http, caplog):
    caplog.set_level(logging.DEBUG)
    client = FakeClient(answer=lambda *_: "said-by-model")
    http = await make_http(client, api_key=("one-key",))
    headers = {"authorization": "Bearer one-key"}
    await http.post("/v1/completions", json={**BODY, "prompt": "asked-by-client", "user": "a-person"}, headers=headers)
    await http.post("/v1/completions", json={**BODY, "prompt": "asked-by-client", "temperature": 9}, headers=headers)
    await http.post("/v1/completions", json={**BODY, "prompt": "asked-by-client"}, headers={"authorization": "Bearer wrong-key"})
    logged = "\n".join(TextFormatter().format(record) + json_formatter().format(record) for record in caplog.records)
    assert "POST /v1/completions 401" in logged
    for secret in ("said-by-model", "asked-by-client", "a-person", "one-key", "wrong-key"):
        assert secret not in logged


def record_of(message, *arguments, error=None):
    exc_info = error and (type(error), error, None)
    return logging.LogRecord("some.logger", logging.WARNING, __file__, 1, message, arguments, exc_info)


NASTY = "a\n2026-01-01 00:00:00,000 INFO server.access: forged\r\x1b[2Kb\u2028c\x00\x85"


def test_text_lines_cannot_be_forged():
    for record in (record_of("%s", NASTY), record_of("failed", error=ValueError(NASTY))):
        first, *others = TextFormatter().format(record).split("\n")
        assert "WARNING some.logger: " in first
        assert all(line.startswith("    ") for line in others)
        text = first + "".join(others)
        assert "forged" in text
        assert len((first + "".join(others)).splitlines()) == 1
        assert "\x1b" not in text


def test_json_lines_hold_one_event_each():
    for record in (record_of("%s", NASTY), record_of("failed", error=ValueError(NASTY + "\ud800"))):
        line = json_formatter().format(record)
        assert len(line.splitlines()) == 1
        event = json.loads(line)
        assert (event["level"], event["logger"], event["process"]) == ("WARNING", "some.logger", record.process)
        assert event["time"].endswith("+00:00")
        assert NASTY in event["message"] + event.get("exc_info", "")


async def test_an_entry_is_flat_in_json_and_one_line_in_text(make_http, caplog):
    caplog.set_level(logging.INFO, logger="server.access")
    await post(await make_http(), n=2)
    (record,) = [record for record in caplog.records if record.name == "server.access"]
    event = json.loads(json_formatter().format(record))
    assert (event["message"], event["finish_reasons"]) == ("POST /v1/completions 200", ["stop", "stop"])
    line = TextFormatter().format(record)
    assert " INFO server.access: POST /v1/completions 200 " in line
    assert " model=tiny prompt_tokens=2 " in line
    assert " finish_reasons=stop,stop " in line


CRASH = """
import logging, threading, warnings
from medusa_core.engine.logs import adopt_library_logs, configure_logging
configure_logging("INFO", "json")
warnings.warn("soon")
library = logging.getLogger("huggingface_hub")
library.propagate = False
library.addHandler(logging.StreamHandler())
adopt_library_logs()
library.warning("of a library")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise RuntimeError("the end")
"""


def test_all_that_a_process_says_is_json():
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, check=False)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert ["soon" in events[0]["message"], events[1]["message"]] == [True, "of a library"]
    assert ["ZeroDivisionError" in events[2]["exc_info"], "the end" in events[3]["exc_info"]] == [True, True]
    assert len(events) == 4


@pytest.mark.parametrize("model", ["fine", "broken"])
async def test_a_server_process_says_only_json(model):
    flags = ("--log-format", "json", "--model", model, "--port", "0")
    command = [sys.executable, "-m", "tests.server.drain_server", "0", *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    lines = []
    while line := await process.stderr.readline():
        lines.append(json.loads(line))
        if "Listening on" in lines[-1]["message"] and model == "fine":
            async with httpx.AsyncClient(base_url=lines[-1]["message"].split()[-1], trust_env=False) as http:
                while (await http.post("/v1/completions", json=BODY)).status_code != 200:
                    await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
    exit_code = await process.wait()
    if model == "fine":
        assert [line["status"] for line in lines if line["logger"] == "server.access"][-1] == 200
        assert (exit_code, "SIGTERM: draining 0 requests" in [line["message"] for line in lines]) == (0, True)
    else:
        assert (exit_code, lines[-1]["level"], lines[-1]["message"]) == (2, "CRITICAL", "The model's file is truncated.")
