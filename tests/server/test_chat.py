"""`/v1/chat/completions`, streamed and whole."""

from __future__ import annotations

import json

import pytest

from tests.server.fakes import FakeClient, FakeText

MESSAGES = [{"role": "user", "content": "Hi"}]


async def post(http, **body):
    return await http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **body})


async def stream(http, **body):
    response = await post(http, stream=True, **body)
    assert response.status_code == 200
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame[6:]) for frame in frames]


async def test_answer_has_the_shape_of_the_api(make_http):
    body = (await post(await make_http())).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    message = {"content": "Hello world 0", "role": "assistant", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    assert body["usage"]["completion_tokens"] == 14
    assert "service_tier" not in body


async def test_role_comes_once_per_choice_first_and_in_index_order(make_http):
    # The fake engine answers the last choice first.
    chunks = await stream(await make_http(), n=3)
    opening = [chunk["choices"][0] for chunk in chunks[:3]]
    assert [choice["index"] for choice in opening] == [0, 1, 2]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in opening)
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[3:])


async def test_last_chunk_of_a_choice_has_an_empty_delta(make_http):
    chunks = await stream(await make_http(), stop="world")
    assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"stop": ["lo w"]}, {"max_completion_tokens": 4}, {"max_tokens": 1}])
async def test_stream_equals_the_whole_answer(make_http, extra):
    http = await make_http()
    whole = (await post(http, **extra)).json()
    chunks = await stream(http, stream_options={"include_usage": True}, **extra)
    texts = [""] * len(whole["choices"])
    reasons = [""] * len(texts)
    for chunk in chunks[:-1]:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])


async def test_default_length_is_the_room_left(make_http):
    client = FakeClient()
    await post(await make_http(client))
    request = client.requests[0]
    assert request.params.max_tokens == 256 - len(request.prompt_token_ids)


async def test_max_completion_tokens_wins_over_max_tokens(make_http):
    client = FakeClient()
    await post(await make_http(client), max_tokens=9, max_completion_tokens=3)
    assert client.requests[0].params.max_tokens == 3


async def test_service_tier_is_named_if_the_client_names_one(make_http):
    http = await make_http()
    assert (await post(http, service_tier="flex")).json()["service_tier"] == "default"
    assert all(chunk["service_tier"] == "default" for chunk in await stream(http, service_tier="auto"))


async def test_messages_reach_the_template(make_http):
    text = FakeText()
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    response = await post(await make_http(text=text), messages=messages, chat_template_kwargs={"enable_thinking": False})
    assert response.status_code == 200
    assert [message["role"] for message in text.last_messages] == ["developer", "user", "assistant", "tool"]
    assert text.last_messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert text.last_kwargs == {"enable_thinking": False}


async def test_continuing_a_message_leaves_the_generation_prompt_out(make_http):
    client = FakeClient()
    http = await make_http(client)
    await post(http, messages=[*MESSAGES, {"role": "assistant", "content": "So"}], continue_final_message=True)
    assert "".join(map(chr, client.requests[0].prompt_token_ids)).endswith("assistant:So")


async def test_fields_without_effect_here_are_accepted(make_http):
    accepted = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "verbosity": "low",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "top_logprobs": None,
        "functions": None,
    }
    assert (await post(await make_http(), **accepted)).status_code == 200
