"""Wrong requests against the real server: each is a clear error in the form of the API, and disturbs nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.server_process import MODEL, Server

pytestmark = pytest.mark.demo

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
VOCAB_SIZE = 151_936
MAX_MODEL_LEN = 32_768

# path, fields that make the request wrong, status, code, param
WRONG_FIELDS: list[tuple[str, dict[str, Any], int, str, str]] = [
    (COMPLETIONS, {"prompt": [1] * (MAX_MODEL_LEN + 1)}, 400, "context_length_exceeded", "prompt"),
    (COMPLETIONS, {"max_tokens": MAX_MODEL_LEN}, 400, "context_length_exceeded", "prompt"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * MAX_MODEL_LEN}]}, 400, "context_length_exceeded", "messages"),
    (COMPLETIONS, {"model": "another"}, 404, "model_not_found", "model"),
    (COMPLETIONS, {"prompt": [VOCAB_SIZE]}, 400, "invalid_prompt", "prompt"),
    (COMPLETIONS, {"prompt": [[1, 2], [3, -1]]}, 400, "invalid_prompt", "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "invalid_prompt", "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"prompt": 5}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"prompt": ["text", 5]}, 400, "invalid_value", "prompt"),
    (CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "invalid_value", "messages[0].content"),
    (CHAT, {"messages": [{"role": "wizard", "content": "Hi"}]}, 400, "invalid_value", "messages[0]"),
    (COMPLETIONS, {"n": 0}, 400, "invalid_value", "n"),
    (COMPLETIONS, {"n": 1000}, 400, "invalid_value", "n"),
    (CHAT, {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (COMPLETIONS, {"max_tokens": "8"}, 400, "invalid_value", "max_tokens"),
    (COMPLETIONS, {"temperature": -1}, 400, "invalid_value", "temperature"),
    (COMPLETIONS, {"temperature": 1e300}, 400, "invalid_value", "temperature"),
    (COMPLETIONS, {"top_p": 0}, 400, "invalid_value", "top_p"),
    (COMPLETIONS, {"seed": 2**64}, 400, "invalid_value", "seed"),
    (COMPLETIONS, {"stop": list("abcde")}, 400, "invalid_value", "stop"),
    (COMPLETIONS, {"temprature": 1}, 400, "unknown_parameter", "temprature"),
    (COMPLETIONS, {"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    (COMPLETIONS, {"logprobs": 21}, 400, "invalid_value", "logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "invalid_value", "tools[0].function"),
]
WRONG_BODIES = {
    "cut short": b'{"model": "' + MODEL.encode() + b'", "prompt": ',
    "no JSON": b"prompt=Hi",
    "empty": b"",
    "a list": b"[1, 2]",
    "NaN": json.dumps({"model": MODEL, "prompt": "Hi", "temperature": float("nan")}).encode(),
    "Infinity": json.dumps({"model": MODEL, "prompt": "Hi", "top_p": float("inf")}).encode(),
    "not UTF-8": b'{"model": "\xff"}',
    "nested too deeply": b"[" * 100_000,
}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 2000
    return error


@pytest.mark.parametrize(
    ("path", "fields", "status", "code", "param"), WRONG_FIELDS, ids=[f"{row[3]}-{row[4]}" for row in WRONG_FIELDS]
)
def test_wrong_fields_are_named(server: Server, path, fields, status, code, param):
    good = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    error = error_of(server.http.post(path, json={"model": MODEL, **good, **fields}), status)
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", WRONG_BODIES.values(), ids=WRONG_BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_bodies_that_are_no_json_object(server: Server, path, body):
    assert error_of(server.http.post(path, content=body), 400)["code"] == "invalid_json"


def test_a_body_of_10_megabytes(server: Server):
    body = {"model": MODEL, "prompt": "x" * 10_000_000}
    assert error_of(server.http.post(COMPLETIONS, json=body), 413)["code"] == "request_too_large"


def test_wrong_requests_disturb_nothing(server: Server):
    """A stream that runs through all of them ends as if alone, and nothing of them is left."""
    prompt = "10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,"
    before = server.text(prompt, max_tokens=24)
    chunks = []
    with server.sdk(is_strict=False).completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=24, stream=True
    ) as stream:
        for chunk in stream:
            chunks.append(chunk.choices[0].text)
            for path, fields, status, *_ in WRONG_FIELDS[3:7]:
                error_of(server.http.post(path, json={"model": MODEL, "prompt": "Hi", **fields}), status)
    assert "".join(chunks) == before
    scrape = server.until_idle()
    assert scrape.value("num_requests_waiting") == 0
    assert scrape.value("kv_cache_usage_perc") == 0
