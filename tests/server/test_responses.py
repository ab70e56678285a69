"""`/v1/responses`: a conversation of items in, items and named events out."""

from __future__ import annotations

import json

import openai
import pytest

from medusa_core.errors import EngineDeadError, QueueFullError
from tests.server.fakes import FakeClient, FakeText

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
BOTH = f"I look.\n{ROME}\n{ROME}"
HELLO = "Hello world 0"


async def post(http, **body):
    return await http.post("/v1/responses", json={"model": "tiny", "input": "Hi", **body})


async def events_of(http, **body) -> list[dict]:
    """Events of a stream, after checking its frames."""
    response = await post(http, stream=True, **body)
    assert response.status_code == 200
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    events = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert events[-1]["sequence_number"] == number
    return events


def stable(items: list[dict]) -> list[dict]:
    """Items without the ids that are new in each answer."""
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


def said(text: str) -> FakeClient:
    return FakeClient(answer=lambda *_: text)


async def test_an_answer_has_the_shape_of_the_api(make_http):
    body = (await post(await make_http(), instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=99)).json()
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["error"], body["incomplete_details"]) == ("response", "completed", None, None)
    assert (body["instructions"], body["metadata"], body["max_output_tokens"]) == ("Be brief.", {"a": "b"}, 99)
    (item,) = body["output"]
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": HELLO, "annotations": [], "logprobs": []}],
    }
    assert body["usage"] == {
        "input_tokens": len("system:Be brief.|user:Hi|"),
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 14,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len("system:Be brief.|user:Hi|") + 14,
    }
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] > 0


async def test_items_become_the_messages_of_a_chat(make_http):
    def parts(kind, *texts):
        return [{"type": kind, "text": text} for text in texts]

    text = FakeText()
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": parts("input_text", "Weather in ", "Rome?")},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": parts("output_text", "I look.")},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rom"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "no city"}]},
        {"type": "function_call", "call_id": "c3", "name": "weather", "arguments": "{}"},
    ]
    assert (await post(await make_http(text=text), input=items)).status_code == 200

    def call(number, arguments):
        return {"id": f"c{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}

    assert text.last_messages == [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call(1, {"city": "Rom"}), call(2, {})]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "tool", "content": "no city", "tool_call_id": "c2"},
        {"role": "assistant", "tool_calls": [call(3, {})]},
    ]


@pytest.mark.parametrize("answer", [HELLO, "", ROME, BOTH, f"{ROME} and that is all"])
async def test_a_stream_ends_with_the_whole_answer(make_http, answer):
    options = {"tools": [TOOL], "temperature": 0.5}
    whole = (await post(await make_http(said(answer)), **options)).json()
    events = await events_of(await make_http(said(answer)), **options)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == []
    assert events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    for name in whole.keys() - {"id", "created_at", "completed_at", "output", "metrics"}:
        assert final[name] == whole[name], name
    assert stable(final["output"]) == stable(whole["output"])
    # each item as its events tell it
    for index, item in enumerate(final["output"]):
        of_item = [event for event in events if event.get("output_index") == index]
        assert of_item[0]["type"] == "response.output_item.added"
        assert of_item[0]["item"]["status"] == "in_progress"
        assert of_item[-1] == {**of_item[-1], "type": "response.output_item.done", "item": item}
        deltas = "".join(event["delta"] for event in of_item if "delta" in event)
        if item["type"] == "message":
            names = ["output_item.added", "content_part.added", "output_text.delta"]
            tail = ["output_text.done", "content_part.done", "output_item.done"]
            assert deltas == item["content"][0]["text"] == of_item[-3]["text"]
        else:
            names = ["output_item.added", "function_call_arguments.delta"]
            tail = ["function_call_arguments.done", "output_item.done"]
            assert deltas == item["arguments"] == of_item[-2]["arguments"]
        kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in of_item))
        assert [kind for kind in names if deltas or not kind.endswith("delta")] + tail == kinds


async def test_a_limit_leaves_the_answer_incomplete(make_http):
    for body in (
        (await post(await make_http(), max_output_tokens=3)).json(),
        (await events_of(await make_http(), max_output_tokens=3))[-1]["response"],
    ):
        assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert (body["output"][0]["status"], body["output"][0]["content"][0]["text"]) == ("incomplete", "Hel")
    assert (await events_of(await make_http(), max_output_tokens=3))[-1]["type"] == "response.incomplete"


async def test_logprobs(make_http):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    body = (await post(await make_http(), **options)).json()
    tokens = body["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in tokens] == [*HELLO, "</s>"]
    assert [len(entry["top_logprobs"]) for entry in tokens] == [1] * 14
    events = await events_of(await make_http(), **options)
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == tokens


async def test_a_failure_in_the_middle_is_told_in_events(make_http):
    client = FakeClient(failure=EngineDeadError("The worker died."), num_free_steps=2)
    *_, error, failed = await events_of(await make_http(client))
    assert (error["type"], error["code"], error["message"]) == ("error", EngineDeadError.code, "The worker died.")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["message"] == "The worker died."
    refused = await post(await make_http(FakeClient(refusal=QueueFullError("Full."))), stream=True)
    assert refused.status_code == 503


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": []}, "invalid_value", "input"),
        ({"input": 5}, "invalid_value", "input"),
        ({"input": [{"role": "wizard", "content": "Hi"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_parameter", "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "unsupported_parameter", "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "invalid_value", "input[0].arguments"),
        ({"input": "x" * 300}, "context_length_exceeded", "input"),
        ({"max_output_tokens": 255}, "context_length_exceeded", "input"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": {"type": "function", "name": "weather"}}, "invalid_value", "tool_choice"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "invalid_value", "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "invalid_value", "text.format"),
        ({"messages": []}, "unknown_parameter", "messages"),
        ({"text": {"format": {"type": "json_object", "schema": {"const": 3}}}}, "invalid_value", "text.format.schema"),
        ({"text": {"format": {"type": "text", "name": "x"}}}, "invalid_value", "text.format.name"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)
async def test_wrong_fields_are_named(make_http, fields, code, param):
    response = await post(await make_http(), **fields)
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)


async def test_the_format_of_the_text_is_a_grammar(make_http):
    client = FakeClient()
    given = {"type": "json_schema", "name": "thing", "schema": {"type": "integer"}, "strict": True}
    body = (await post(await make_http(client), text={"format": given})).json()
    grammar = client.requests[0].params.grammar
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", {"type": "integer"})
    assert body["text"] == {"format": given}


async def test_the_sdk_reads_answers_strictly(make_sdk):
    sdk = await make_sdk(said(BOTH))
    answer = await sdk.responses.create(model="tiny", input="Hi", tools=[{**TOOL, "strict": False}])
    assert answer.output_text == "I look."
    assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
    assert json.loads(answer.output[1].arguments) == {"city": "Rom"}
    # its items go back as they are, and as the SDK writes them
    sdk = await make_sdk()
    dumped = [item.model_dump() for item in answer.output]
    again = await sdk.responses.create(model="tiny", input=[{"role": "user", "content": "Hi"}, *dumped[1:]])
    assert again.output_text == HELLO
    answer = await sdk.responses.create(model="tiny", input=[{"role": "user", "content": "Hi"}, *answer.output])
    assert answer.output_text == HELLO


async def test_the_sdks_stream_helper_collects_the_answer(make_sdk):
    client = said(BOTH)
    sdk = await make_sdk(client)
    async with sdk.responses.stream(model="tiny", input="Hi", tools=[{**TOOL, "strict": True}]) as stream:
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert answer.output_text == "I look."
    assert [item.name for item in answer.output[1:]] == ["weather", "weather"]
    assert client.requests[0].params.grammar is not None, "as in chat completions"


async def test_the_sdk_raises_our_errors(make_sdk):
    sdk = await make_sdk()
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        await sdk.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve("resp_1")
