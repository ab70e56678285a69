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


TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}, "seconds": {"type": "boolean"}},
            "required": ["zone", "seconds"],
            "additionalProperties": False,
        },
    },
}


def test_a_strict_function_is_called_in_free_text_with_arguments_of_its_schema(server: Server):
    """The model knows better, and writes the whole name where it may."""
    code = {"type": "string", "maxLength": 3}
    parameters = {"type": "object", "properties": {"city": code}, "required": ["city"], "additionalProperties": False}
    question = {"role": "user", "content": "What is the weather in Paris and in London?"}

    def city(*, strict: bool, enabled: bool = True) -> str:
        tool = {**WEATHER, "function": {**WEATHER["function"], "parameters": parameters, "strict": strict}}
        options = {**OPTIONS, "tools": [tool, TIME], "extra_body": {"speculative": {"enabled": enabled}}}
        choice = server.sdk().chat.completions.create(messages=[question], **options).choices[0]
        assert choice.finish_reason == "tool_calls"
        return json.loads(choice.message.tool_calls[0].function.arguments)["city"]

    assert len(city(strict=False)) > 3
    held = city(strict=True)
    assert len(held) <= 3
    assert city(strict=True, enabled=False) == held


@pytest.mark.parametrize("enabled", [True, False])
def test_a_call_by_name_is_enforced_whatever_the_question(server: Server, enabled: bool):
    options = {**OPTIONS, "tools": [WEATHER, TIME], "extra_body": {"speculative": {"enabled": enabled}}}
    choice = {"type": "function", "function": {"name": "get_time"}}
    answer = server.sdk().chat.completions.create(messages=[QUESTION], tool_choice=choice, **options).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, arguments.keys()) == ("get_time", {"zone", "seconds"})
    assert arguments["zone"] in ("UTC", "CET")


def test_some_call_is_enforced_when_sampled(server: Server):
    question = {"role": "user", "content": "Tell me a joke about cats."}
    options = {**OPTIONS, "tools": [WEATHER, TIME], "temperature": 1.0, "seed": 5, "n": 3, "parallel_tool_calls": False}
    answer = server.sdk().chat.completions.create(messages=[question], tool_choice="required", **options)
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert call.function.name in ("get_current_weather", "get_time")
        assert isinstance(json.loads(call.function.arguments), dict)
