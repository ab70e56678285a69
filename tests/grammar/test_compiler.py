"""What can be compiled, what is refused and how, and what JSON may look like."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medusa_core.errors import InvalidParameterError, UnsupportedParameterError
from medusa_core.grammar.compiler import MAX_GRAMMAR_CHARS, GrammarCompiler, check_grammar, vocabulary
from medusa_core.params import Grammar
from tests.engine.tiny_model import EOS_ID, VOCAB_SIZE
from tests.engine.tiny_model import _tokenizer as byte_tokenizer
from tests.grammars import PIECES, no_compiler, tiny_compiler

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}
LOOP = {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}
SPECIAL = "<|user|>"
NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(lambda: vocabulary(byte_tokenizer(), VOCAB_SIZE, [EOS_ID]))


def accepts(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.compile(grammar)
    token_ids = byte_tokenizer().encode(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(value), field="the field")


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        (schema(OBJECT), ['{"a": 1, "b": "x"}', '{"a":1,"b":""}'], ['{"b": "x", "a": 1}', '{"a": "1", "b": "x"}', '{"a": 1}', "5"]),
        (schema({"type": "number", "multipleOf": 0.25}), ["1.75", "3", "-0.50"], ["1.3", "0.2"]),
        (schema({"anyOf": [{"type": "integer", "multipleOf": 60}, {"multipleOf": 0.7}]}), ["120", "1.4"], ["61", "0.3"]),
        (schema({"type": "object"}), ["{}", '{"x": [1, {"y": null}]}'], ["[]", "", '"x"']),
        (schema(NODE), ["{}", '{"next": {"next": {}}}'], ['{"next": 1}']),
        (Grammar(kind="regex", text=r"\d{3}-[a-c]+|é?"), ["123-abc", "é", ""], ["12-a", "x", "123-"]),
        (
            Grammar(kind="choice", text=json.dumps(["a", "ab", 'q"\\\n', "Zoë 😀"])),
            ["a", "ab", 'q"\\\n', "Zoë 😀"],
            ["b", "aba", ""],
        ),
        (Grammar(kind="cfg", text='start: "(" start ")" | "x"'), ["x", "((x))"], ["((x)", ""]),
        (Grammar(kind="regex", text="a/b|[/]c"), ["a/b", "/c"], ["ab"]),
        (Grammar(kind="cfg", text='root ::= "a" root "b" | "c"'), ["c", "aacbb"], ["acbb"]),
    ],
)
def test_grammars_take_their_texts_and_no_others(compiler, grammar, texts, others):
    check_grammar(grammar)
    assert [text for text in texts if not accepts(compiler, grammar, text)] == []
    assert [text for text in others if accepts(compiler, grammar, text)] == []


def test_space_in_json_is_free_but_not_endless(compiler):
    assert accepts(compiler, schema(OBJECT), json.dumps({"a": 1, "b": "x"}, indent=4))
    assert accepts(compiler, schema(OBJECT), '{\n\t"a" : 1 , "b":"x"\r\n}')
    assert not accepts(compiler, schema(OBJECT), '{"a":' + " " * 41 + '1, "b": "x"}')
    assert not accepts(compiler, schema(OBJECT), ' {"a": 1, "b": "x"}')


def many_keys(count, letter="p"):
    return {"type": "object", "properties": {f"{letter}{number}": {} for number in range(count)}}


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind="regex", text="(a", field="the field"),
        Grammar(kind="regex", text="(?=a)b", field="the field"),
        Grammar(kind="regex", text="\ud83d", field="the field"),
        Grammar(kind="cfg", text="no grammar (((", field="the field"),
        Grammar(kind="cfg", text="", field="the field"),
        Grammar(kind="choice", text="[]", field="the field"),
        Grammar(kind="choice", text='["a", ""]', field="the field"),
        Grammar(kind="choice", text='["a", 1]', field="the field"),
        Grammar(kind="choice", text='"a"', field="the field"),
        Grammar(kind="json_schema", text="{", field="the field"),
        Grammar(kind="json_schema", text="3", field="the field"),
        Grammar(kind="json_schema", text='{"enum":' * 10_000, field="the field"),
        schema({"type": "text"}),
        schema({"not": {"type": "string"}}),
        schema({"type": "string", "format": "shoe size"}),
        schema({"$ref": "https://example.com/schema"}),
        schema({"enum": ["x" * MAX_GRAMMAR_CHARS]}),
        schema({"allOf": [{"type": "string", "pattern": f"^({letter}.*){{1,30}}$"} for letter in "ab"]}),
        Grammar(kind="regex", text="(" * 9000 + ")" * 9000, field="the field"),
        # without limits of our own these would take minutes, or all the memory there is
        schema({"type": "integer", "multipleOf": 999_983}),
        schema({"type": "number", "multipleOf": 1e300}),
        schema({"allOf": [{"type": "number", "multipleOf": 9973}, {"multipleOf": 0.9967}]}),
        schema({"multipleOf": 0}),
        Grammar(kind="cfg", text='start: %json {"multiple\\u004ff": 999983}', field="the field"),
        Grammar(kind="cfg", text="\n".join(f'r{i} ::= r{i + 1} "x"' for i in range(600)), field="the field"),
        Grammar(kind="cfg", text="\n" * 50_000 + "\n".join(f'r{i}: "a"?' for i in range(1001)), field="the field"),
        Grammar(kind="cfg", text='root ::= ("a"' + "\n" * 60_000, field="the field"),
        # and these would halt all other requests for a second
        schema(many_keys(1001)),
        schema({"anyOf": [many_keys(600, letter) for letter in "abc"]}),
        Grammar(kind="cfg", text=f"start: %json {json.dumps(many_keys(1001))}", field="the field"),
        Grammar(kind="cfg", text="start: r0\n" + "\n".join(f'r{i}: "a"?' for i in range(1001)), field="the field"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_field(compiler, grammar):
    for check in (check_grammar, compiler.compile):
        with pytest.raises(InvalidParameterError, match="the field") as raised:
            check(grammar)
        assert raised.value.param == "the field"
        assert raised.value.hint
        assert len(str(raised.value)) < 700
        assert "<non-verbose" not in str(raised.value)


@pytest.mark.parametrize("grammar", [schema(LOOP), Grammar(kind="regex", text=r"[^\s\S]", field="the field")])
def test_what_no_text_matches_is_refused_when_the_vocabulary_is_there(compiler, grammar):
    with pytest.raises(InvalidParameterError, match="no text matches it"):
        compiler.compile(grammar)


@pytest.mark.parametrize("options", ["", '%llguidance {"allow_invalid_utf8": true}', '%llguidance {"no_forcing": false}'])
def test_no_way_to_write_the_only_text_is_forced(options):
    matcher = tiny_compiler().compile(Grammar(kind="cfg", text=f'{options}\nstart: "abc" /c?/'))
    mask_W = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)
    allowed = {PIECES[token_id] for token_id in range(len(PIECES)) if mask_W[token_id >> 5] >> (token_id & 31) & 1}
    assert allowed == {"a", "ab", "abc"}


def test_matchers_are_the_callers_own(compiler):
    grammar = Grammar(kind="regex", text="[ab]{3}")
    first = compiler.compile(grammar)
    assert first.consume_tokens(byte_tokenizer().encode("aba"))
    assert compiler.compile(grammar).validate_tokens(byte_tokenizer().encode("bbb")) == 3
    assert first.is_accepting()


def test_a_matcher_that_comes_back_starts_again_with_the_next_lane(compiler):
    grammar = Grammar(kind="regex", text="[ab]{3}")
    first, second = compiler.lend(grammar), compiler.lend(grammar)
    assert first is not second
    assert first.deep_copy().consume_tokens(byte_tokenizer().encode("aba"))
    assert second.validate_tokens(byte_tokenizer().encode("bbb")) == 3
    compiler.take_back(grammar, first)
    assert compiler.lend(grammar) is first
    assert first.validate_tokens(byte_tokenizer().encode("bbb")) == 3


def test_a_matcher_that_has_failed_is_not_lent_again(compiler):
    grammar = Grammar(kind="regex", text="[ab]{4}")
    failed = compiler.lend(grammar)
    assert not failed.consume_tokens(byte_tokenizer().encode("xx"))
    compiler.take_back(grammar, failed)
    assert compiler.lend(grammar) is not failed


def test_the_vocabulary_is_read_for_the_first_grammar_only():
    num_reads = []

    def load():
        num_reads.append(1)
        return vocabulary(byte_tokenizer(), VOCAB_SIZE, [EOS_ID])

    compiler = GrammarCompiler(load)
    assert not num_reads
    for number in range(40):
        compiler.compile(Grammar(kind="regex", text=f"{number}"))
    assert len(num_reads) == 1


def test_tokenizers_of_no_use_are_named_as_the_reason():
    compiler = no_compiler()
    for _ in range(2):
        with pytest.raises(
            UnsupportedParameterError, match="the field is not supported with this model's tokenizer: there is none"
        ):
            compiler.compile(Grammar(kind="regex", text="a", field="the field"))
    with pytest.raises(ValueError, match="no EOS token"):
        vocabulary(byte_tokenizer(), VOCAB_SIZE, [])
    with pytest.raises(ValueError, match="tokenizers library"):
        vocabulary(object(), VOCAB_SIZE, [EOS_ID])


@pytest.mark.parametrize("multiple", ["1e-2000000", "1e99999999999999999999", "1e-99999999999999999999", "0e5", "0.0"])
def test_multiples_that_no_number_can_have_are_refused_at_once(multiple):
    grammar = Grammar(kind="json_schema", text=f'{{"type": "number", "multipleOf": {multiple}}}', field="the field")
    with pytest.raises(InvalidParameterError, match="multipleOf"):
        check_grammar(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"const": f"a{SPECIAL}b"}),
        schema({"enum": [SPECIAL, "x"]}),
        Grammar(kind="choice", text=json.dumps([SPECIAL])),
        Grammar(kind="regex", text=SPECIAL.replace("|", r"\|")),
        Grammar(kind="cfg", text=f"start: {json.dumps(SPECIAL)}"),
    ],
)
def test_text_that_is_spelt_like_a_special_token_is_written_in_ordinary_ones(grammar):
    """Where only that text can come next, too."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    special_id = tokenizer.convert_tokens_to_ids(SPECIAL)
    matcher = GrammarCompiler(lambda: vocabulary(tokenizer, len(tokenizer), [EOS_ID])).compile(grammar)
    text = ""
    for _ in range(60):
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        token_ids = [i for i in np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() if i < len(tokenizer)]
        assert special_id not in token_ids
        if EOS_ID in token_ids:
            break
        letter = next((i for i in token_ids if not tokenizer.decode([i]).isspace()), token_ids[0])
        text += tokenizer.decode([letter])
        assert matcher.consume_token(letter)
    assert SPECIAL in text
