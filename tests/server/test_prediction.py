"""Predicted outputs: what reaches the engine, and how much of it came true."""

from __future__ import annotations

import json

import pytest

from server.prediction import PredictionCount
from tests.server.fakes import FakeClient

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def predicted(content) -> dict:
    return {**CHAT, "prediction": {"type": "content", "content": content}}


@pytest.mark.parametrize("content", ["Hello there", [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]])
async def test_it_reaches_the_engine_and_usage_tells_what_came_true(make_http, content):
    client = FakeClient()
    http = await make_http(client)
    usage = (await http.post("/v1/chat/completions", json=predicted(content))).json()["usage"]
    assert client.requests[0].params.prediction == tuple(map(ord, "Hello there"))
    # "Hello " of "Hello world 0"
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 5}
    body = {**predicted(content), "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = await http.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert chunks[-1]["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 12,
        "rejected_prediction_tokens": 10,
    }


async def test_usage_is_as_ever_without_one(make_http):
    for body in (CHAT, predicted("")):
        assert (
            "completion_tokens_details" not in (await (await make_http()).post("/v1/chat/completions", json=body)).json()["usage"]
        )


async def test_more_than_the_context_is_cut(make_http):
    client = FakeClient()
    assert (await (await make_http(client)).post("/v1/chat/completions", json=predicted("x" * 1000))).status_code == 200
    assert len(client.requests[0].params.prediction) == 256


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("text", "prediction"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "image", "content": "x"}, "prediction.type"),
        ({"type": "content", "content": 5}, "prediction.content"),
    ],
)
async def test_wrong_ones_name_their_field(make_http, prediction, param):
    body = json.dumps({**CHAT, "prediction": prediction})
    response = await (await make_http()).post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("prediction", "output", "num_accepted"),
    [
        ("abcdef", "abcdef", 6),
        ("abcdef", "", 0),
        ("abcdef", "xyz", 0),
        ("abcdef", "abXYdef", 5),  # goes on at "de"
        ("abcdef", "cdefab", 6),
        ("aaaa", "aaaaaaaa", 4),  # each counts once
        ("abcabd", "abd", 4),  # a, b; then "bd" is further on
        ("a", "a", 1),
    ],
)
def test_counts(prediction, output, num_accepted):
    count = PredictionCount([ord(character) for character in prediction])
    for character in output:
        count.add([ord(character)])
    assert (count.num_accepted, count.num_rejected) == (num_accepted, len(prediction) - num_accepted)
