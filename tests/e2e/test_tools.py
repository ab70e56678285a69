"""A tool's round trip: the model calls it, the client answers, the model tells the result."""

from __future__ import annotations

import json

import pytest

from tests.e2e.server_process import MODEL, Server

pytestmark = pytest.mark.demo

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
OPTIONS = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_tokens": 60}


def test_a_call_and_its_result(server: Server):
    sdk = server.sdk()
    choice = sdk.chat.completions.create(messages=[QUESTION], parallel_tool_calls=False, **OPTIONS).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_current_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "cloudy, 21 degrees"}
    answer = sdk.chat.completions.create(messages=[QUESTION, choice.message, result], tool_choice="none", **OPTIONS).choices[0]
    assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
    assert "21" in answer.message.content


def test_a_streamed_call_is_the_whole_one(server: Server):
    sdk = server.sdk()
    whole = sdk.chat.completions.create(messages=[QUESTION], **OPTIONS).choices[0]
    with sdk.chat.completions.stream(messages=[QUESTION], **OPTIONS) as events:
        streamed = events.get_final_completion().choices[0]
    calls = [[(call.function.name, call.function.arguments) for call in one.message.tool_calls] for one in (whole, streamed)]
    assert calls[0] == calls[1]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
