"""The grammar of enforced calls, under the matcher that will run it: it takes what it should, and no more."""

from __future__ import annotations

import json
import random

import llguidance.hf
import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from medusa_core.text.hermes import CLOSE, OPEN, HermesParser, hermes_grammar
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


@pytest.fixture(scope="module", params=[True, False], ids=["marker_tokens", "marker_text"])
def kind(request):
    """(tokenizer, that of llguidance, whether the markers are tokens)."""
    backend = BUILDERS["byte_level"]()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    if request.param:
        backend.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in (OPEN, CLOSE)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
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
