"""Strict functions: where calling is the model's own choice, a grammar of text with calls holds them to their schema."""

from __future__ import annotations

from tests.server.fakes import FakeText
from tests.server.test_bad_input import chat_error
from tests.server.test_chat import post
from tests.server.test_tools import BOTH, NOW, NOW_CALL, ROME, WEATHER, function, plain, saying, takes


def strict(tool):
    return {**tool, "function": {**tool["function"], "strict": True}}


async def test_strict_functions_are_held_to_their_schema_where_calls_are_free(make_http):
    client = saying(ROME)
    http = await make_http(client)
    wrong_rome, wrong_now = ROME.replace("city", "town"), NOW_CALL.replace("{}", '{"a": 1}')
    texts = ["", "Hello", f"{BOTH}\nDone", '{"name": "Bob"}', wrong_rome, f"Hm. {wrong_rome}", wrong_now]
    for tools, refused in (
        ([strict(WEATHER), NOW], texts[4:6]),
        ([WEATHER, strict(NOW)], texts[6:]),
        ([strict(WEATHER), strict(NOW)], texts[4:]),
    ):
        for extra in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}, {"response_format": {"type": "text"}}):
            answer = (await post(http, tools=tools, **extra)).json()
            assert answer["choices"][0]["finish_reason"] == "tool_calls"
            grammar = client.requests[-1].params.grammar
            assert [text for text in texts if not takes(grammar, text)] == refused
    assert (await post(http, tools=[strict(WEATHER)], tool_choice="none")).status_code == 200
    assert client.requests[-1].params.grammar is None


async def test_what_no_grammar_holds_is_no_call_of_a_strict_function(make_http):
    call = '{"name": "now", "arguments": {}}'
    text = f"So:\n```json\n{call}\n```"
    http = await make_http(saying(text))
    (choice,) = (await post(http, tools=[strict(NOW)])).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert (await post(http, tools=[NOW])).json()["choices"][0]["finish_reason"] == "tool_calls"
    (choice,) = (await post(await make_http(saying(call)), tools=[strict(NOW)])).json()["choices"]
    assert [plain(call) for call in choice["message"]["tool_calls"]] == [("now", "{}")]


async def test_tokens_beside_plain_text_may_be_in_text_beside_strict_calls(make_http):
    text = FakeText()
    text.added_tokens = lambda: {7: "<think>", 9: "<tool_call>"}
    client = saying("Hello")
    await post(await make_http(client, text=text), tools=[strict(NOW)])
    assert "<[7]>" in client.requests[0].params.grammar.text


async def test_descriptions_take_no_room_in_a_grammar_and_change_no_values(make_http):
    client = saying(NOW_CALL)
    properties = {
        "title": {"type": "string", "title": "T", "description": "d" * 40_000},
        "kind": {"enum": [{"description": "a"}, "b"], "$comment": "c" * 40_000},
    }
    parameters = {"type": "object", "properties": properties, "required": ["title", "kind"], "additionalProperties": False}
    for choice in ("auto", "required"):
        answer = await post(await make_http(client), tools=function(parameters=parameters, strict=True), tool_choice=choice)
        assert answer.status_code == 200
        grammar = client.requests[-1].params.grammar
        call = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
        assert takes(grammar, call % '{"title": "x", "kind": {"description": "a"}}')
        assert takes(grammar, call % '{"title": "x", "kind": "b"}')
        for wrong in ('{"title": 1, "kind": "b"}', '{"title": "x", "kind": {}}', '{"kind": "b"}'):
            assert not takes(grammar, call % wrong)


async def test_strict_is_for_schemas_that_can_be_kept(make_http):
    wrong = function(parameters={"type": "object", "properties": {"a": {"type": "strin"}}}, strict=True)
    error = await chat_error(await make_http(), tools=wrong)
    assert (error["code"], error["param"]) == ("invalid_value", "tools")
