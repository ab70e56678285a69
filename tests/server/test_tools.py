"""Tools in chat completions: what the model is told, and its calls, streamed and whole."""

from __future__ import annotations

import json
import re

import llguidance
import openai
import pytest
from pydantic import BaseModel

from medusa_core.text.tool_formats import TOOL_FORMATS
from server.settings import ServerSettings
from tests.server.fakes import EOS, FakeClient, FakeText
from tests.server.test_bad_input import chat_error
from tests.server.test_chat import post, stream

MESSAGES = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
BOTH = f'I look.\n{ROME}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'


def saying(text):
    return FakeClient(answer=lambda *_: text)


def plain(call):
    return call["function"]["name"], call["function"]["arguments"]


async def collected(http, **body):
    """(content, [(name, arguments)], finish reason) of each choice of a stream, after checking its chunks."""
    chunks = await stream(http, **body)
    choices = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            content, calls, reason = choices.get(choice["index"], ("", [], None))
            assert reason is None, "nothing comes after a finish reason"
            content += choice["delta"].get("content", "")
            for piece in choice["delta"].get("tool_calls", ()):
                if "id" in piece:
                    assert piece["index"] == len(calls)
                    assert piece.keys() == {"index", "id", "type", "function"}
                    assert (piece["type"], piece["function"]["arguments"]) == ("function", "")
                    calls.append((piece["function"]["name"], ""))
                else:
                    assert piece.keys() == {"index", "function"}
                    assert piece["function"].keys() == {"arguments"}
                    name, arguments = calls[piece["index"]]
                    calls[piece["index"]] = (name, arguments + piece["function"]["arguments"])
            choices[choice["index"]] = (content, calls, choice["finish_reason"])
    return [choices[index] for index in sorted(choices)]


async def test_an_answer_of_calls_has_the_shape_of_the_api(make_http):
    (choice,) = (await post(await make_http(saying(ROME)), tools=TOOLS)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"content": None, "role": "assistant", "refusal": None}
    assert re.fullmatch(r"call_[0-9a-f]{24}", call.pop("id"))
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}


async def test_an_answer_without_calls_is_as_ever(make_http):
    (choice,) = (await post(await make_http(saying("a <b> c\n")), tools=TOOLS)).json()["choices"]
    assert choice["message"] == {"content": "a <b> c\n", "role": "assistant", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_several_calls_beside_text(make_http):
    (choice,) = (await post(await make_http(saying(BOTH)), tools=TOOLS)).json()["choices"]
    assert choice["message"]["content"] == "I look."
    calls = choice["message"]["tool_calls"]
    assert [plain(call) for call in calls] == [("weather", '{"city": "Rom"}'), ("now", "{}")]
    assert calls[0]["id"] != calls[1]["id"]


@pytest.mark.parametrize("text", ["Hello", ROME, BOTH, f"{BOTH}\nDone.\n", BOTH[:70], "<tool_call>\n{no", f"x {ROME} y {ROME} z"])
@pytest.mark.parametrize(
    "extra", [{}, {"n": 2}, {"parallel_tool_calls": False}, {"stop": "Rom"}, {"stop": "</tool_call>"}, {"max_tokens": 40}]
)
async def test_a_stream_says_what_the_whole_answer_says(make_http, text, extra):
    http = await make_http(saying(text))
    whole = (await post(http, tools=TOOLS, **extra)).json()["choices"]
    expected = [
        (choice["message"]["content"] or "", [plain(c) for c in choice["message"].get("tool_calls", ())], choice["finish_reason"])
        for choice in whole
    ]
    assert await collected(http, tools=TOOLS, **extra) == expected


async def test_without_parallel_calls_the_first_one_ends_answer_and_engine(make_http):
    client = saying(BOTH)
    answer = (await post(await make_http(client), tools=TOOLS, parallel_tool_calls=False, return_token_ids=True)).json()
    (choice,) = answer["choices"]
    assert [plain(call) for call in choice["message"]["tool_calls"]] == [("weather", '{"city": "Rom"}')]
    assert choice["finish_reason"] == "tool_calls"
    spoken = BOTH[: BOTH.index("Rom") + 5]
    assert choice["token_ids"] == [*map(ord, spoken)]
    assert answer["usage"]["completion_tokens"] == len(spoken)
    assert client.aborted
    assert client.num_live == 0


async def test_each_choice_ends_with_its_own_first_call(make_http):
    client = FakeClient(answer=lambda _, choice: BOTH if choice == 0 else f"Text {ROME}")
    answer = (await post(await make_http(client), n=2, tools=TOOLS, parallel_tool_calls=False)).json()
    assert [len(choice["message"]["tool_calls"]) for choice in answer["choices"]] == [1, 1]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["I look.", "Text"]


@pytest.mark.parametrize(("extra", "reason"), [({"max_tokens": 50}, "length"), ({"stop": "Rom"}, "stop")])
async def test_a_call_broken_off_is_there_but_is_no_reason(make_http, extra, reason):
    (choice,) = (await post(await make_http(saying(ROME)), tools=TOOLS, **extra)).json()["choices"]
    assert choice["finish_reason"] == reason
    ((name, arguments),) = [plain(call) for call in choice["message"]["tool_calls"]]
    assert name == "weather"
    assert '{"city": "Rom"}'.startswith(arguments)


async def test_token_ids_are_those_of_the_whole_text(make_http):
    http = await make_http(saying(BOTH))
    ids = [*map(ord, BOTH), EOS]
    answer = (await post(http, tools=TOOLS, return_token_ids=True)).json()
    assert answer["choices"][0]["token_ids"] == ids
    assert answer["usage"]["completion_tokens"] == len(ids)
    chunks = await stream(http, tools=TOOLS, return_token_ids=True)
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", ())] == ids


async def test_the_template_is_given_the_tools_as_models_know_them(make_http):
    text = FakeText()
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    body = {"tools": [strict, NOW], "tool_choice": "auto", "chat_template_kwargs": {"x": 1}}
    assert (await post(await make_http(text=text), **body)).status_code == 200
    nothing = {"name": "now", "parameters": {"type": "object", "properties": {}}}
    assert text.last_kwargs == {"x": 1, "tools": [WEATHER, {"type": "function", "function": nothing}]}


async def test_with_choice_none_the_model_is_not_told_and_calls_are_text(make_http):
    text = FakeText()
    answer = (await post(await make_http(saying(ROME), text=text), tools=TOOLS, tool_choice="none")).json()
    assert answer["choices"][0]["message"]["content"] == ROME
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert not (text.last_kwargs or {}).get("tools")


async def test_without_tools_calls_are_text(make_http):
    http = await make_http(saying(ROME))
    for extra in ({}, {"tools": []}, {"chat_template_kwargs": {"tools": TOOLS}}):
        assert (await post(http, **extra)).json()["choices"][0]["message"]["content"] == ROME


def function(**fields):
    return [{"type": "function", "function": {"name": "f", **fields}}]


@pytest.mark.parametrize(
    ("extra", "param", "mention"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "functions", "function": {"name": "f"}}]}, "tools[0].type", "function"),
        ({"tools": [5]}, "tools[0]", ""),
        ({"tools": "weather"}, "tools", "list"),
        ({"tools": [NOW] * 2}, "tools", "now"),
        ({"tools": [NOW] * 129}, "tools", "128"),
        ({"tools": function(name="two words")}, "tools[0].function.name", "letters"),
        ({"tools": function(name="x" * 65)}, "tools[0].function.name", "64"),
        ({"tools": function(name="")}, "tools[0].function.name", "letters"),
        ({"tools": function(parameters={"type": "array"})}, "tools[0].function.parameters", "object"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters", "dictionary"),
        ({"tools": function(description=5)}, "tools[0].function.description", "string"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "later"}}}, "tool_choice", "later"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "no tools"),
        ({"tools": TOOLS, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
    ],
)
async def test_wrong_tools_name_the_place(make_http, extra, param, mention):
    error = await chat_error(await make_http(), **extra)
    assert (error["code"], error["param"]) == ("invalid_value", param)
    assert mention in error["message"]
    assert len(error["message"]) < 500


BY_NAME = {"type": "function", "function": {"name": "now"}}
NOW_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "required": ["name"]}}}


def takes(grammar, text):
    """Whether an answer may be this text, by tokens of one byte each."""
    tokens = [bytes([value]) for value in range(1, 128)] + [b"<eos>"]
    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteTokens(tokens)))
    matcher = llguidance.LLMatcher(vocabulary, llguidance.grammar_from("grammar", grammar.text))
    assert not matcher.get_error()
    return matcher.try_consume_tokens([ord(character) - 1 for character in text]) == len(text) and matcher.is_accepting()


class ByteTokens:
    """A vocabulary as llguidance wants it described."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.special_token_ids = [self.eos_token_id]
        self.bos_token_id = None

    @property
    def eos_token_id(self):
        return len(self.tokens) - 1

    def __call__(self, text):
        return [value - 1 for value in (text if isinstance(text, bytes) else text.encode())]


@pytest.mark.parametrize(
    ("extra", "taken"),
    [
        ({"tool_choice": "required"}, [ROME, NOW_CALL, f"{ROME}\n{NOW_CALL}"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [ROME, NOW_CALL]),
        ({"tool_choice": BY_NAME}, [NOW_CALL]),
        ({"tool_choice": "required", "response_format": JSON}, [ROME, NOW_CALL, f"{ROME}\n{NOW_CALL}"]),
        ({"response_format": JSON}, [ROME, NOW_CALL, f"{ROME}\n{NOW_CALL}", '{"name": "now"}']),
        ({"response_format": {"type": "json_object"}}, [ROME, NOW_CALL, f"{ROME}\n{NOW_CALL}", "{}", '{"name": "now"}']),
        ({"response_format": JSON, "parallel_tool_calls": False}, [ROME, NOW_CALL, '{"name": "now"}']),
    ],
)
async def test_calls_are_enforced_by_a_grammar(make_http, extra, taken):
    client = saying(ROME)
    answer = (await post(await make_http(client), tools=TOOLS, **extra)).json()
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    grammar = client.requests[0].params.grammar
    wrong = ["", "Hello", ROME.replace("city", "town"), NOW_CALL.replace("{}", '{"a": 1}')]
    texts = [ROME, NOW_CALL, f"{ROME}\n{NOW_CALL}", "{}", '{"name": "now"}', *wrong]
    assert [text for text in texts if takes(grammar, text)] == taken


async def test_a_free_choice_needs_no_grammar(make_http):
    client = saying(ROME)
    http = await make_http(client)
    for extra in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}):
        assert (await post(http, tools=TOOLS, **extra)).status_code == 200
    assert [request.params.grammar for request in client.requests] == [None] * 4


async def test_an_answer_that_response_format_asks_for_is_no_call(make_http):
    text = '{"name": "now", "arguments": {}}'
    http = await make_http(saying(text))
    assert (await post(http, tools=TOOLS, response_format=JSON)).json()["choices"][0]["message"]["content"] == text
    assert (await post(http, tools=TOOLS)).json()["choices"][0]["finish_reason"] == "tool_calls"


async def test_grammars_that_cannot_be_are_refused(make_http):
    http = await make_http()
    wrong = function(parameters={"type": "object", "properties": {"a": {"type": "strin"}}})
    error = await chat_error(http, tools=wrong, tool_choice="required")
    assert (error["code"], error["param"]) == ("invalid_value", "tools")
    error = await chat_error(http, tools=TOOLS, structured_outputs={"regex": "a"})
    assert (error["code"], error["param"]) == ("invalid_value", "structured_outputs")


async def test_a_server_that_reads_no_calls_takes_no_tools(make_http):
    text = FakeText()
    text.chat_template_text = "{{ messages }} <tool_call> arguments"
    for http in (
        await make_http(tool_call_parser="none"),
        await make_http(tool_call_parser="hermes", text=text),
        await make_http(text=text),
    ):
        error = await chat_error(http, tools=TOOLS)
        assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
        assert "--tool-call-parser" in error["message"]
        assert (await post(http, tools=TOOLS, tool_choice="none")).status_code == 200


async def test_the_format_can_be_named_where_the_template_does_not_tell(make_http):
    text = FakeText()
    text.chat_template_text = "{{ tools }}"
    http = await make_http(saying(ROME), text=text, tool_call_parser="hermes")
    assert (await post(http, tools=TOOLS)).json()["choices"][0]["finish_reason"] == "tool_calls"
    assert (await chat_error(await make_http(text=text), tools=TOOLS))["param"] == "tools"


def test_the_option_names_every_format():
    field = ServerSettings.model_fields["tool_call_parser"]
    assert set(field.annotation.__args__) == {"auto", "none", *TOOL_FORMATS}


async def test_sdk_reads_calls_and_sends_them_back(make_sdk):
    sdk = await make_sdk(saying(BOTH))
    answer = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
    message = answer.choices[0].message
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"city": "Rom"}, {}]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in message.tool_calls]
    # as the SDK's users do it: the message itself goes into the history
    await sdk.chat.completions.create(model="tiny", messages=[*MESSAGES, message, *results], tools=TOOLS)


@pytest.mark.parametrize("n", [1, 2])
async def test_sdk_stream_helper_accumulates_calls(make_sdk, n):
    sdk = await make_sdk(saying(BOTH))
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS, n=n) as events:
        async for _ in events:
            pass
        final = await events.get_final_completion()
    assert len(final.choices) == n
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls"
        calls = choice.message.tool_calls
        assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", '{"city": "Rom"}'), ("now", "{}")]
        assert choice.message.content == "I look."


class weather(BaseModel):
    """The function has the class's name."""

    city: str


async def test_sdk_parses_arguments_into_models(make_sdk):
    sdk = await make_sdk(saying(ROME))
    options = {"model": "tiny", "messages": MESSAGES, "tools": [openai.pydantic_function_tool(weather)]}
    answer = await sdk.chat.completions.parse(**options)
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == weather(city="Rom")
    async with sdk.chat.completions.stream(**options) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == weather(city="Rom")
