"""Bodies as vllm-router passes them on: it adds fields of other servers, with values that ask for nothing."""

from __future__ import annotations

import pytest

# vllm-router 0.1.17 in front of a server that printed what came.
TO_BOTH = {
    "stream": False,
    "no_stop_trim": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "return_hidden_states": False,
}
TO_COMPLETIONS = {"model": "tiny", "prompt": "Hi", "echo": False, **TO_BOTH}
TO_CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "logprobs": False,
    "continue_final_message": False,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "include_reasoning": True,
    **TO_BOTH,
}
BODIES = [("/v1/completions", TO_COMPLETIONS), ("/v1/chat/completions", TO_CHAT)]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_routed_request_is_answered(make_http, path, body):
    response = await (await make_http()).post(path, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("no_stop_trim", True), ("return_hidden_states", True), ("separate_reasoning", False), ("include_reasoning", False)],
)
async def test_what_these_fields_would_change_is_refused(make_http, field, value):
    response = await (await make_http()).post("/v1/chat/completions", json={**TO_CHAT, field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
