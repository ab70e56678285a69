"""How much one request may ask for. Each limit is told with its field and is met by a request that is just within it."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from medusa_core.grammar.compiler import MAX_GRAMMAR_CHARS
from medusa_core.params import MAX_STOP_TOKEN_IDS
from server.protocol.common import MAX_BIASES, MAX_STOP_CHARS
from tests.server.fakes import VOCAB_SIZE, FakeClient
from tests.server.test_bad_input import CHAT, COMPLETIONS, MESSAGES, error_of

RESPONSES = "/v1/responses"
BODIES = {COMPLETIONS: {"prompt": "Hi"}, CHAT: {"messages": MESSAGES}, RESPONSES: {"input": "Hi"}}


def tools(count, *, is_flat=False):
    functions = [{"name": f"f{number}"} for number in range(count)]
    if is_flat:
        return [{"type": "function", **function, "parameters": {}, "strict": False} for function in functions]
    return [{"type": "function", "function": function} for function in functions]


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


@pytest.mark.parametrize(
    ("path", "field", "largest", "too_large", "param"),
    [
        (COMPLETIONS, "n", 128, 129, "n"),
        (COMPLETIONS, "prompt", ["a"] * 128, ["a"] * 129, "prompt"),
        (COMPLETIONS, "prompt", [[1]] * 128, [[1]] * 129, "prompt"),
        (COMPLETIONS, "prompt", "a" * 240, "a" * 257, "prompt"),
        (COMPLETIONS, "prompt", [1] * 240, [1] * 500_000, "prompt"),
        (COMPLETIONS, "best_of", 1, 129, "best_of"),
        (COMPLETIONS, "logprobs", 20, 21, "logprobs"),
        (COMPLETIONS, "stop", ["x" * MAX_STOP_CHARS] * 4, ["x" * (MAX_STOP_CHARS + 1)], "stop"),
        (COMPLETIONS, "stop", ["x"] * 4, ["x"] * 5, "stop"),
        (COMPLETIONS, "stop_token_ids", [1] * MAX_STOP_TOKEN_IDS, [1] * (MAX_STOP_TOKEN_IDS + 1), "stop_token_ids"),
        (
            COMPLETIONS,
            "logit_bias",
            {str(number): 1 for number in range(VOCAB_SIZE)},
            {str(number): 1 for number in range(MAX_BIASES + 1)},
            "logit_bias",
        ),
        (COMPLETIONS, "response_format", form(nested(30)), form(nested(200)), "response_format"),
        (COMPLETIONS, "response_format", form({}), form({"enum": ["x" * MAX_GRAMMAR_CHARS]}), "response_format"),
        (CHAT, "tools", tools(128), tools(129), "tools"),
        (CHAT, "top_logprobs", 20, 21, "top_logprobs"),
        (CHAT, "metadata", {str(number): "" for number in range(16)}, {str(number): "" for number in range(17)}, "metadata"),
        (RESPONSES, "tools", tools(128, is_flat=True), tools(129, is_flat=True), "tools"),
        (RESPONSES, "metadata", {str(number): "" for number in range(16)}, {str(number): "" for number in range(17)}, "metadata"),
    ],
)
async def test_limits(make_http, path, field, largest, too_large, param):
    client = FakeClient()
    http = await make_http(client)
    body = {"model": "tiny", **BODIES[path]} | ({"logprobs": True} if field == "top_logprobs" else {})
    assert (await http.post(path, json={**body, field: largest})).status_code == 200
    client.requests.clear()
    error = error_of(await http.post(path, json={**body, field: too_large}), 400)
    assert error["param"].startswith(param)
    assert field in error["message"]
    assert len(error["message"]) < 1000
    assert client.requests == []


@pytest.mark.parametrize("place", ["http://127.0.0.1:{port}/schema", "file:///etc/hostname"])
async def test_schemas_are_not_fetched_from_elsewhere(make_http, place):
    connections = []

    def accept():
        with listener, contextlib.suppress(OSError):
            connections.append(listener.accept())

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept)
    thread.start()
    reference = {"$ref": place.format(port=listener.getsockname()[1])}
    response = await (await make_http()).post(
        COMPLETIONS, json={"model": "tiny", "prompt": "Hi", "response_format": form(reference)}
    )
    assert error_of(response, 400)["param"] == "response_format.json_schema.schema"
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert connections == []
