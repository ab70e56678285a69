"""The grammar of enforced calls, under the matcher that will run it: it takes what it should, and no more."""

from __future__ import annotations

import json
import random

import llguidance.hf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from medusa_core.text.hermes import CLOSE, OPEN, HermesParser, hermes_grammar
from medusa_core.text.tokenizer import Tokenizer
from medusa_core.text.tool_calls import CallArguments, CallStart, ToolFunction
from tests.text.conftest import BUILDERS

WEATHER = ToolFunction(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 3}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"unit": {"enum": ["C", 'quote " and \\']}},
    },
)
TIME = ToolFunction(name="time-now", parameters={"properties": {}, "additionalProperties": False})


def call(name, arguments):
    return f'{OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSE}'


PARIS = call("get_weather", '{"city": "Rom", "unit": "C"}')
NOW = call("time-now", "{}")


def new_tokenizer(has_marker_tokens):
    backend = BUILDERS["byte_level"]()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    # as models have them, for reasoning and for indented code
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>", "  ", "\n\n")])
    if has_marker_tokens:
        backend.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in (OPEN, CLOSE)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module", params=[True, False], ids=["marker_tokens", "marker_text"])
def kind(request):
    """(tokenizer, that of llguidance, whether the markers are tokens)."""
    tokenizer = new_tokenizer(request.param)
    return tokenizer, llguidance.hf.from_tokenizer(tokenizer), request.param


def is_taken(kind, text, functions, **options):
    """Whether an answer of this text may end here."""
    tokenizer, ll_tokenizer, has_marker_tokens = kind
    matcher = LLMatcher(ll_tokenizer, hermes_grammar(functions, has_marker_tokens=has_marker_tokens, **options))
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize("text", [PARIS, NOW, f"{PARIS}\n{NOW}", f"{NOW}\n{NOW}\n{PARIS}", call("get_weather", '{"city": ""}')])
def test_calls_are_taken(kind, text):
    assert is_taken(kind, text, [WEATHER, TIME], is_single=False)
    assert is_taken(kind, text, [WEATHER, TIME], is_single=True) == (text.count(OPEN) == 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        f" {NOW}",
        f"{NOW}\n",
        f"{NOW}{NOW}",
        f"{NOW}\nDone",
        NOW.removesuffix(CLOSE),
        call("other", "{}"),
        call("get_weather", "{}"),
        call("get_weather", '{"city": 5}'),
        call("get_weather", '{"city": "Rom", "mood": 1}'),
        call("get_weather", '{"city": "Rom", "unit": "F"}'),
        call("get_weather", '{"city": "Rome"}'),
        call("get_weather", '{"city":   "Rom"}'),
        call("time-now", '{"a": 1}'),
        call("time-now", "[]"),
    ],
)
@pytest.mark.parametrize("is_single", [True, False])
def test_all_else_is_refused(kind, text, is_single):
    assert not is_taken(kind, text, [WEATHER, TIME], is_single=is_single)


def test_a_function_without_schema_takes_any_object(kind):
    anything = ToolFunction(name="f", parameters={})
    assert is_taken(kind, call("f", '{"a": [1, {"b": null}]}'), [anything], is_single=True)
    assert not is_taken(kind, call("f", "[]"), [anything], is_single=True)


def test_an_answer_of_json_may_be_the_alternative(kind):
    options = {"is_single": True, "answer_schema": {"type": "object", "required": ["name"]}}
    assert is_taken(kind, NOW, [TIME], **options)
    assert is_taken(kind, '{"name": 5, "more": []}', [TIME], **options)
    assert not is_taken(kind, "{}", [TIME], **options)
    assert not is_taken(kind, '{"name": 5}\n' + NOW, [TIME], **options)


ROME = '{"name": "get_weather", "arguments": {"city": "Rom"}}'
INDENTED = '{\n  "name" : "get_weather",\n  "arguments": {"city": "Rom"}\n}'
ANYTHING = ToolFunction(name="f", parameters={})


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", []),
        ("Hello", []),
        ('It is {"name": "Bob", "arguments": {}}.\n```json\n{"name": "x"}\n```\n', []),
        ('{"name": "Bob", "age": 5}', []),
        ('{"name": "get_weather"}', []),
        ('{"nam', []),
        (PARIS, ['{"city": "Rom", "unit": "C"}']),
        (f"Hm.\n{PARIS}\n{NOW}\nDone.\n", ['{"city": "Rom", "unit": "C"}', "{}"]),
        (ROME, ['{"city": "Rom"}']),
        (f"{ROME}\nDone", ['{"city": "Rom"}']),
        (f"{ROME}\n{ROME}\n{NOW}", ['{"city": "Rom"}', '{"city": "Rom"}', "{}"]),
        (f"```json\n{INDENTED}\n```\n", ['{"city": "Rom"}']),
        (f"```\n{INDENTED}\n```\n```json\n{ROME}", ['{"city": "Rom"}'] * 2),
        ('{"name": "f", "arguments": {"a": [1]}}', ['{"a": [1]}']),
        # Those that no grammar can hold to a schema are content.
        (f"So:\n```json\n{ROME}\n```", []),
        ('{"arguments": {"town": "Rom"}, "name": "get_weather"}', []),
    ],
)
def test_text_with_calls_is_taken_and_read(kind, text, arguments):
    assert is_taken(kind, text, [WEATHER, TIME, ANYTHING], is_single=False, text_tokens={})
    events = read_held(text)
    assert [event.text for event in events if isinstance(event, CallArguments)] == arguments


def read_held(text):
    parser = HermesParser(offered=["get_weather", "time-now", "f"], is_held=True)
    return [event for event in parser.push(text) + parser.flush() if not isinstance(event, str)]


@pytest.mark.parametrize("made_wrong", [lambda text: text.replace("Rom", "Rome"), lambda text: text.replace("city", "town")])
@pytest.mark.parametrize("text", [PARIS, f"Hm.\n{PARIS}", ROME, f"\n {ROME}", f"```json\n{INDENTED}", f"{NOW}\n{ROME}"])
def test_calls_in_text_are_held_to_their_schema(kind, text, made_wrong):
    assert is_taken(kind, text, [WEATHER, TIME], is_single=False, text_tokens={})
    assert not is_taken(kind, made_wrong(text), [WEATHER, TIME], is_single=False, text_tokens={})


def test_text_may_have_the_tokens_that_are_said_to_be_text(kind):
    tokenizer, _, has_marker_tokens = kind
    texts = Tokenizer(tokenizer).added_tokens()
    for text in ("<think>", "Hm.<think>Done", f"<think>{PARIS}<think>"):
        assert is_taken(kind, text, [WEATHER], is_single=False, text_tokens=texts)
        assert not is_taken(kind, text, [WEATHER], is_single=False, text_tokens={})
    for text in ("a  b\n\n  c", f"<think>\n\nHm.</think>\n\n{PARIS}\n\nSo.", f"{ROME}\n\n"):
        assert is_taken(kind, text, [WEATHER], is_single=False, text_tokens=texts)
    for text in (f"</think>\n\n{PARIS}", f"\n\n{ROME}", ROME.replace(": ", ":  ", 1), f"<think>a</think>{PARIS}"):
        assert not is_taken(kind, text.replace("city", "town"), [WEATHER], is_single=False, text_tokens=texts)
    # A marker is one whatever is said of it, and may stand behind a call without the other.
    assert is_taken(kind, f"{ROME}\n{CLOSE}", [WEATHER], is_single=False, text_tokens=texts)
    assert is_taken(kind, f"a{CLOSE}", [WEATHER], is_single=False, text_tokens=texts) == (not has_marker_tokens)


PIECES = [
    OPEN, CLOSE, "```json\n", "```\n", "```", "{", "}", "\n", " ", "\x1d", "\xa0", "word", ",", ":",
    '"name"', '"arguments"', '"get_weather"',
    '{"name": "get_weather", "arguments":', '{"city": "Rom"}', '{"city": 5}', "{}", '{"arguments": {}, "name": "get_weather"}',
    "<think>", "</think>", "  ", "\n\n", '{"name": "f", "arguments": {}}', ROME, ROME.replace("city", "town"), PARIS, NOW,
]  # fmt: skip


@pytest.mark.parametrize("has_marker_tokens", [True, False])
@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_text_that_is_taken_has_a_call_that_does_not_fit(byte_matchers, has_marker_tokens, data):
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=12)))
    matcher, tokenizer = byte_matchers[has_marker_tokens]
    matcher.reset()
    # piece by piece, so that a text with something wrong is cut in front of it
    taken = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if not matcher.try_consume_tokens([token_id]):
            break
        taken += tokenizer.decode([token_id])
    events = read_held(taken)
    starts = [event for event in events if isinstance(event, CallStart)]
    for start in starts:
        told = "".join(event.text for event in events if isinstance(event, CallArguments) and event.call_idx == start.call_idx)
        if start.call_idx < len(starts) - 1 or matcher.is_accepting():
            value = json.loads(told)
            assert start.name != "get_weather" or (value.keys() <= {"city", "unit"} and isinstance(value["city"], str))


@pytest.fixture(scope="module")
def byte_matchers():
    """By whether the markers are tokens: (matcher of text with calls, its tokenizer)."""
    made = {}
    for has_marker_tokens in (True, False):
        tokenizer = new_tokenizer(has_marker_tokens)
        texts = Tokenizer(tokenizer).added_tokens()
        functions = [WEATHER, TIME, ANYTHING]
        grammar = hermes_grammar(functions, is_single=False, has_marker_tokens=has_marker_tokens, text_tokens=texts)
        made[has_marker_tokens] = LLMatcher(llguidance.hf.from_tokenizer(tokenizer), grammar), tokenizer
    return made


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_grammar_lets_through_is_read_as_calls_that_fit(kind, seed):
    """Random tokens of those allowed, up to the end."""
    tokenizer, ll_tokenizer, has_marker_tokens = kind
    draw = random.Random(seed)
    grammar = hermes_grammar([WEATHER, TIME], is_single=bool(seed % 2), has_marker_tokens=has_marker_tokens)
    matcher = LLMatcher(ll_tokenizer, grammar)
    bitmask = allocate_token_bitmask(1, ll_tokenizer.vocab_size)
    token_ids = []
    while not matcher.is_stopped():
        assert len(token_ids) < 2000
        fill_next_token_bitmask(matcher, bitmask)
        allowed = np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little"))
        token_ids.append(int(draw.choice(allowed)))
        assert matcher.consume_token(token_ids[-1])
    parser = HermesParser()
    events = parser.push(tokenizer.decode(token_ids, skip_special_tokens=True)) + parser.flush()
    assert parser.has_calls
    for start, arguments in zip(events[::2], events[1::2], strict=True):
        assert isinstance(start, CallStart)
        assert isinstance(arguments, CallArguments)
        value = json.loads(arguments.text)
        assert value.keys() <= {"city", "unit"} if start.name == "get_weather" else value == {}
