"""API keys: how they are written, what is kept of them, the file, and what their limits do to requests."""

from __future__ import annotations

import asyncio
import hashlib
import os

import httpx
import openai
import pytest

from medusa_core.errors import ConfigError, EngineDeadError, EngineError
from server.auth import APIKeyMiddleware
from server.keys import Keyring, hashed
from server.limits import KeyLimits
from server.settings import ServerSettings, load_settings
from tests.server.fakes import FakeClient
from tests.server.test_bad_input import error_of

BODY = {"model": "tiny", "prompt": "Hi"}


def digest(key):
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("entry", "name", "key"),
    [
        ("secret", "key-2bb80d53", "secret"),
        ("alice=secret", "alice", "secret"),
        (digest("secret"), "key-2bb80d53", "secret"),
        (f"alice={digest('secret').upper().replace('SHA256', 'sha256')}", "alice", "secret"),
        # an equals sign in a key, and those at the end of base64
        ("alice=a=b", "alice", "a=b"),
        ("c2VjcmV0c2VjcmV0c2VjcmV0cw==", None, "c2VjcmV0c2VjcmV0c2VjcmV0cw=="),
        ("al/ice=secret", None, "al/ice=secret"),
    ],
)
def test_ways_to_write_a_key(entry, name, key):
    found = Keyring([entry]).find(key.encode())
    assert found is not None
    assert name in (None, found.name)
    assert Keyring([entry]).find(b"wrong") is None


@pytest.mark.parametrize("entry", ["", " ", "sha256:12", "alice=sha256:zz", "alice= ", "alice="])
def test_wrong_keys_are_refused_unseen(entry):
    with pytest.raises(ValueError, match=r"^(Keys must not be empty|A digest is)"):
        hashed(entry)


def test_no_option_keeps_a_key():
    settings = load_settings(["--api-key", "alice=secret", "other-secret"])
    assert "secret" not in repr(settings)
    assert "secret" not in settings.model_dump_json()
    # another process that is given these options accepts the same keys
    again = ServerSettings(api_key=settings.api_key).keyring()
    assert (again.find(b"secret").name, again.find(b"secrets")) == ("alice", None)


def write(path, text, *, age_s=0):
    path.write_text(text)
    os.utime(path, (1e9 - age_s, 1e9 - age_s))


def test_a_file_names_keys_and_their_limits(tmp_path):
    file = tmp_path / "keys.toml"
    alice = f'[alice]\nkey = "{digest("a")}"\nrequests_per_minute = 5\n'
    file.write_text(alice + '["bob@example.org"]\nkey = ["old", "new"]\ntokens_per_minute = 7\n')
    keyring = Keyring(["ci=c"], str(file), limits=KeyLimits(requests_per_minute=60))
    assert keyring.find(b"a").limits == KeyLimits(requests_per_minute=5)
    assert keyring.find(b"old").name == keyring.find(b"new").name == "bob@example.org"
    assert keyring.find(b"new").limits == KeyLimits(requests_per_minute=60, tokens_per_minute=7)
    assert keyring.find(b"c").limits == KeyLimits(requests_per_minute=60)


def test_a_changed_file_is_read_again_and_a_wrong_one_changes_nothing(tmp_path, caplog):
    now_s = [0.0]
    file = tmp_path / "keys.toml"
    write(file, '[a]\nkey = "one"', age_s=9)
    keyring = Keyring([], str(file), clock=lambda: now_s[0])
    write(file, '[a]\nkey = "two"', age_s=8)
    # looked at now and then only
    assert keyring.find(b"one") is not None
    now_s[0] += 10
    assert (keyring.find(b"one"), keyring.find(b"two").name) == (None, "a")
    write(file, '[a]\nkey = "three', age_s=7)
    now_s[0] += 10
    assert keyring.find(b"two") is not None
    file.unlink()
    now_s[0] += 10
    assert keyring.find(b"two") is not None
    assert "stay as they were" in caplog.text
    assert "three" not in caplog.text


@pytest.mark.parametrize(
    "text",
    ["key", "[a]\nkey = 5", '[a]\nkey = ""', "[a]\nlimit = 1", '["a b"]\nkey = "x"', '[a]\nkey = "x"\nparallel_requests = 0'],
)
def test_a_wrong_file_is_refused_at_start(tmp_path, text):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"--api-key-file .*keys\.toml"):
        ServerSettings(api_key_file=str(file)).keyring()


def test_a_file_without_keys_lets_nobody_in_and_limits_need_keys(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text("")
    keyring = Keyring([], str(file))
    assert keyring.is_used
    assert keyring.find(b"") is None
    with pytest.raises(ConfigError, match="--api-key"):
        ServerSettings(key_requests_per_minute=5).keyring()


async def test_beyond_its_limit_a_key_is_answered_429_and_others_are_not(make_http):
    http = await make_http(api_key=("a=one", "b=two"), key_requests_per_minute=2)
    answers = [await http.post("/v1/completions", json=BODY, headers=bearer("one")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    error = error_of(answers[-1], 429)
    assert error["code"] == "rate_limit_exceeded"
    assert "2 requests per minute" in error["message"]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    assert (await http.post("/v1/completions", json=BODY, headers=bearer("two"))).status_code == 200
    # costs nothing, so it is not counted
    assert (await http.get("/v1/models", headers=bearer("one"))).status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
async def test_prompt_and_completion_are_charged(make_http, is_stream):
    http = await make_http(api_key=("one",), key_tokens_per_minute=100)
    body = {**BODY, "prompt": "x" * 120, "max_tokens": 5, "stream": is_stream}
    assert (await http.post("/v1/completions", json=body, headers=bearer("one"))).status_code == 200
    refused = await http.post("/v1/completions", json=BODY, headers=bearer("one"))
    assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
    # 125 of 100 are used; the next needs one, at 100 in 60 s
    assert 15 <= int(refused.headers["retry-after"]) <= 16


async def test_who_leaves_before_the_first_token_pays_for_the_prompt(make_server):
    client = FakeClient(gate=asyncio.Event())
    url = await make_server(client, api_key=("one",), key_tokens_per_minute=100)
    async with httpx.AsyncClient(base_url=url, headers=bearer("one"), trust_env=False) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/completions", json={**BODY, "prompt": "x" * 120}, timeout=0.2)
        while client.num_live:
            await asyncio.sleep(0.01)
        refused = await http.post("/v1/completions", json=BODY)
        assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        (line,) = [line for line in (await http.get("/metrics")).text.splitlines() if line.startswith("medusa_key_tokens_total{")]
        assert line.endswith(" 120.0")


async def test_what_the_engine_fails_at_costs_no_tokens(make_http):
    http = await make_http(FakeClient(failure=EngineDeadError("Dead.")), api_key=("one",), key_tokens_per_minute=100)
    for _ in range(3):
        failed = await http.post("/v1/completions", json={**BODY, "prompt": "x" * 90}, headers=bearer("one"))
        assert error_of(failed, 500)["code"] == "engine_dead"


async def test_what_is_refused_costs_no_tokens(make_http):
    http = await make_http(api_key=("one",), key_tokens_per_minute=10)
    for _ in range(3):
        wrong = {**BODY, "prompt": "x" * 1000}
        assert error_of(await http.post("/v1/completions", json=wrong, headers=bearer("one")), 400)
    answer = await http.post("/v1/completions", json=BODY, headers=bearer("one"))
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-tokens"]) == (200, "10")


async def test_metrics_tell_who_used_how_much(make_http):
    http = await make_http(api_key=("a=one", "b=two"), key_requests_per_minute=2)
    usages = []
    for key in ("one", "one", "one", "two"):
        answer = (await http.post("/v1/completions", json=BODY, headers=bearer(key))).json()
        usages.append(answer.get("usage", {}).get("total_tokens", 0))
    await http.post("/v1/completions", json=BODY, headers=bearer("three"))
    page = (await http.get("/metrics")).text
    assert f'medusa_key_tokens_total{{key="a"}} {usages[0] + usages[1]:.1f}\n' in page
    assert f'medusa_key_tokens_total{{key="b"}} {usages[3]:.1f}\n' in page
    assert 'medusa_key_requests_total{key="a",status="200"} 2.0\n' in page
    assert 'medusa_key_requests_total{key="a",status="429"} 1.0\n' in page
    assert 'medusa_requests_refused_total{reason="rate_limit_exceeded"} 1.0\n' in page
    assert 'medusa_requests_refused_total{reason="invalid_api_key"} 1.0\n' in page


async def test_the_sdk_reads_the_limit(make_sdk):
    sdk = await make_sdk(api_key=("key",), key_requests_per_minute=1)
    await sdk.completions.create(**BODY)
    with pytest.raises(openai.RateLimitError) as caught:
        await sdk.completions.create(**BODY)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


async def test_parallel_requests_count_until_they_end_also_by_a_disconnect(make_server):
    client = FakeClient(gate=asyncio.Event(), num_free_steps=1)
    url = await make_server(client, api_key=("one",), key_parallel_requests=1)
    async with httpx.AsyncClient(base_url=url, headers=bearer("one"), trust_env=False) as http:
        async with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as running:
            await running.aiter_bytes().__anext__()
            refused = await http.post("/v1/completions", json=BODY)
            assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        client.gate.set()
        while (await http.post("/v1/completions", json=BODY)).status_code == 429:
            await asyncio.sleep(0.01)


async def test_a_limiter_that_does_not_answer_lets_nobody_through(make_http):
    class Silent:
        async def acquire(self, key_name, limits):
            raise EngineError("The main process does not answer.")

    client = FakeClient()
    http = await make_http(client, api_key=("one",), key_requests_per_minute=2)
    http.app.middleware_stack = None
    for middleware in http.app.user_middleware:
        if middleware.cls is APIKeyMiddleware:
            middleware.kwargs["limiter"] = Silent()
    assert error_of(await http.post("/v1/completions", json=BODY, headers=bearer("one")), 500)["code"] == "engine_error"
    assert client.requests == []


async def test_everything_needs_a_key_but_what_machines_poll(make_http):
    http = await make_http(api_key=("one",))
    for path in ("/health", "/ready", "/metrics", "/version", "/openapi.json"):
        assert (await http.get(path)).status_code == 200
    for path in ("/v1/models", "/v1/nope", "/tokenizer_info", "/nope", "/health/", "//health", "/"):
        assert (await http.get(path)).status_code == 401
    assert (await http.get("/nope", headers=bearer("one"))).status_code == 404


async def test_a_prefix_in_front_of_all_paths_opens_none(make_http):
    """As when the app is mounted under one, or behind a proxy that says so."""
    http = await make_http(api_key=("one",))
    transport = httpx.ASGITransport(http.app, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as mounted:
        assert (await mounted.get("/llm/v1/models")).status_code == 401
        assert (await mounted.get("/llm/v1/models", headers=bearer("one"))).status_code == 200
        assert (await mounted.get("/llm/health")).status_code == 200


@pytest.mark.parametrize(("options", "salts"), [({}, ["", ""]), ({"isolate_keys": True}, ["a", "b"])])
async def test_cached_prompts_are_kept_apart_if_asked_for(make_http, options, salts):
    client = FakeClient()
    http = await make_http(client, api_key=("a=one", "b=two"), **options)
    for key in ("one", "two"):
        assert (await http.post("/v1/completions", json=BODY, headers=bearer(key))).status_code == 200
    assert [request.cache_salt for request in client.requests] == salts
