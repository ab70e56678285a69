"""Calls in Hermes' format are told from content while they are written, and nothing is lost of what is no call."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_core.text.hermes import CLOSE, OPEN, HermesParser, is_hermes
from medusa_core.text.tool_calls import CallArguments, CallStart

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

ESCAPES = '{"s": "}</tool_call>{\\"\\\\"}'


def read(pieces, **options):
    """(content, [(name, arguments)], whether the calls are whole) of an answer that comes in these pieces."""
    parser = HermesParser(**options)
    content, calls = "", []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.flush():
        if isinstance(event, str):
            content += event
        elif isinstance(event, CallStart):
            assert event.call_idx == len(calls)
            calls.append((event.name, ""))
        else:
            # Arguments of one call never come behind the beginning of the next.
            assert event.call_idx == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls, parser.has_calls


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello", "Hello", []),
        ("", "", []),
        (WEATHER, "", [("get_weather", '{"city": "Paris"}')]),
        (f"I look it up.\n{WEATHER}\n", "I look it up.", [("get_weather", '{"city": "Paris"}')]),
        (f"{WEATHER}\n{WEATHER}", "", [("get_weather", '{"city": "Paris"}')] * 2),
        (f"One:\n{WEATHER}\nTwo:\n{WEATHER}\nDone.\n", "One:\nTwo:\nDone.\n", [("get_weather", '{"city": "Paris"}')] * 2),
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call> { "name" : "f" , "arguments" :  {"a" : [ {} ]}  } </tool_call>', "", [("f", '{"a" : [ {} ]}')]),
        ('<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", "{}")]),
        (f'<tool_call>{{"name": "{"f" * 64}"}}</tool_call>', "", [("f" * 64, "{}")]),
        (f'<tool_call>{{"name": "f", "arguments": {ESCAPES}}}</tool_call>!', "!", [("f", ESCAPES)]),
        # A closing marker, and a brace in front of it, may be missing or be there too often.
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}', "", [("f", "{}"), ("g", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}} and more', " and more", [("f", "{}")]),
        # Wrong inside the arguments: theirs as they are, up to the marker.
        ('<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call> Oh', " Oh", [("f", '{"a": [1}}')]),
    ],
)  # fmt: skip
def test_content_and_calls(text, content, calls):
    assert read([text]) == (content, calls, bool(calls))


@pytest.mark.parametrize(
    "text",
    [
        "a < b, <tool_cal",
        "<tool_call>",
        "<tool_call>\nnothing\n</tool_call>",
        '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f", "parameters": {}}</tool_call>',
        '<tool_call>{"name": "not a name", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f ", "arguments": {}}</tool_call>',
        '<tool_call>{"name": " f", "arguments": {}}</tool_call>',
        '<tool_call>{"name ": "f", "arguments": {}}</tool_call>',
        f'<tool_call>{{"name": "{"f" * 65}", "arguments": {{}}}}</tool_call>',
        '<tool_call>{"name": "f\\u0061", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f',
        '<tool_call>{"name": "f", "argum',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1',
        '<tool_call>{"arguments": {"a": <tool_call>',
        "<tool_call>[]</tool_call>",
        "</tool_call>\n",
        " \n ",
    ],
)
def test_what_is_no_call_is_content_to_the_last_character(text):
    assert read([text]) == (text, [], False)


@pytest.mark.parametrize("wrong", ["<tool_call>", "<tool_call>{", '<tool_call>{"arguments": {"a": ', "<tool_call>no</tool_call>"])
def test_a_call_behind_a_wrong_one_is_found(wrong):
    assert read([wrong, WEATHER]) == (wrong, *read([WEATHER])[1:])


BARE = '{"name": "f", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (BARE, "", "f"),
        (f"```json\n{BARE}\n```", "", "f"),
        (f"```\n{BARE}\n```\n", "", "f"),
        ('```json\n{\n  "name": "f",\n  "arguments": {\n    "a": "```"\n  }\n}\n```', "", "f"),
        (f"{BARE}\n{BARE.replace('f', 'g')}", "", "fg"),
        (f"{BARE}}}\n</tool_call>", "", "f"),
        (f"Look:\n\n```json\n{BARE}\n```\nSo.", "Look:\nSo.", "f"),
        (f"  \n{BARE}", "", "f"),
        (f"```json\n{BARE}\n```\n\n```json\n{BARE}\n```", "", "ff"),
        (f"{BARE}\n{WEATHER}", "", ["f", "get_weather"]),
        ('{"arguments": {}, "name": "g"}', "", "g"),
    ],
)
def test_calls_of_offered_functions_need_no_markers(text, content, names):
    got, calls, is_whole = read([text], offered=["f", "g"])
    assert (got, [name for name, _ in calls], is_whole) == (content, [*names], True)
    assert read([text])[1] == (read([WEATHER])[1] if WEATHER in text else []), "they do where nothing was offered"


@pytest.mark.parametrize(
    "text",
    [
        BARE.replace('"f"', '"Bob"'),
        f"It is {BARE}",
        f"It is\n{BARE}",
        f"`{BARE}`",
        f"```python\n{BARE}\n```",
        '{"name": "f"}',
        '{"name": "f", "age": 5}',
        '{"name": "f", "arguments": []}',
        f"[{BARE}]",
        "```\n{",
        "``",
    ],
)
def test_other_json_is_content(text):
    assert read([text], offered=["f", "g"]) == (text, [], False)


def test_a_call_that_breaks_off_is_there_but_not_whole():
    assert read(['<tool_call>{"name": "f", "arguments": {"a": "x']) == ("", [("f", '{"a": "x')], False)
    assert read([WEATHER, '<tool_call>{"name": "f", "arguments": {']) == (
        "", [("get_weather", '{"city": "Paris"}'), ("f", "{")], False
    )  # fmt: skip


def test_everything_is_told_as_soon_as_it_is_certain():
    parser = HermesParser()
    assert parser.push("Let me see") == ["Let me see"]
    assert parser.push(" <") == []
    assert parser.push("b> ") == [" <b>"]
    assert parser.push("\n<tool_") == []
    assert parser.push('call>\n{"name": "f", "arg') == []
    assert parser.push('uments": {"a"') == [CallStart(0, "f"), CallArguments(0, '{"a"')]
    assert parser.push(': "<') == [CallArguments(0, ': "<')]
    assert parser.push('/tool_call>"}}\n') == [CallArguments(0, '/tool_call>"}')]
    assert parser.push("</tool_call>\n") == []
    assert parser.push("B") == ["\nB"]
    assert parser.flush() == []


def test_text_is_not_held_back_for_long():
    parser = HermesParser(offered=["f"])
    assert parser.push('{"na') == []
    assert parser.push('tion": ') == ['{"nation":']
    assert HermesParser(offered=["f"]).push('{"name": "Bob') == []
    assert HermesParser(offered=["f"]).push('{"name": "Bob M') == ['{"name": "Bob M']
    assert HermesParser(offered=["f"]).push('{"name": "Bob", "age": 5') == ['{"name": "Bob", "age": 5']


def test_a_single_call_ends_the_answer():
    parser = HermesParser(is_single=True)
    assert parser.push('Hm.<tool_call>{"name": "f", "arguments": {"a": 1}') == [
        "Hm.",
        CallStart(0, "f"),
        CallArguments(0, '{"a": 1}'),
    ]
    assert parser.is_finished
    assert parser.push(f"}}{CLOSE}{WEATHER}") == []
    assert parser.flush() == []
    assert read([f"{WEATHER} and {WEATHER}"], is_single=True) == ("", [("get_weather", '{"city": "Paris"}')], True)


FRAGMENTS = [
    OPEN, CLOSE, OPEN[:5], CLOSE[:-3], '{"name": "f", "arguments": ', '{"arguments": ', ', "name": "g"}', '"name": "h"',
    "```json\n", "```", "{", "}", "[", "]", '"', "\\", "<", ">", "\n", " ", "word", "é", ",", ":", '{"a": "</tool_call>"}', WEATHER,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join)


@given(TEXTS, st.lists(st.integers(0, 300), max_size=30), st.booleans(), st.sampled_from(["", "fgh"]))
def test_the_pieces_of_a_text_make_no_difference(text, cuts, is_single, offered):
    options = {"is_single": is_single, "offered": offered}
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == text
    whole = read([text], **options)
    assert read(pieces, **options) == whole
    assert read(list(text), **options) == whole
    content, calls, _ = whole
    if not calls:
        assert content == text
    left = iter(text)
    assert all(character in left for character in content), "content is told in order, and made of nothing else"
    for _, arguments in calls:
        assert arguments in text or arguments == "{}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from([OPEN, CLOSE, '"', "\\", "}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True), st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
    min_size=1,
    max_size=3,
)


@given(st.sampled_from(["", "Sure.", "a\n\nb"]), CALLS, st.booleans())
def test_calls_are_read_as_chat_templates_write_them(content, calls, is_ascii):
    written = [(name, json.dumps(arguments, ensure_ascii=is_ascii)) for name, arguments in calls]
    text = content + "".join(f'\n<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>' for name, text in written)
    assert read(list(text)) == (content, written, True)


def test_templates_of_the_format_are_recognised():
    hermes = '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    assert is_hermes(f"{{{{ tools }}}} return within <tool_call></tool_call> tags:\n<tool_call>\n{hermes}")
    assert not is_hermes("{{ messages }}")
    assert not is_hermes("<tool_call>\n<function=example>\n<parameter=arguments>")
    assert not is_hermes("<tool_call>name\n<arg_key>key</arg_key> arguments")
