"""Prompts that ask for the text between two texts."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from medusa_core.errors import InvalidParameterError, UnsupportedParameterError
from medusa_core.text.fill_in_middle import FILL_TOKENS, encode_fill
from medusa_core.text.tokenizer import Tokenizer
from tests.text.conftest import BUILDERS

SENTENCEPIECE = ("byte_fallback", "metaspace")


def tokenizer_with(kind, names, *, has_bos):
    backend = BUILDERS[kind]()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", *names)])
    if has_bos:
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


@pytest.mark.parametrize("names", FILL_TOKENS)
@pytest.mark.parametrize("kind", ["byte_level", *SENTENCEPIECE])
@pytest.mark.parametrize("has_bos", [True, False])
def test_each_text_stands_behind_its_token(names, kind, has_bos):
    tokenizer = tokenizer_with(kind, names, has_bos=has_bos)
    token_ids = encode_fill(tokenizer, "the dog", "jumps over")
    prefix_id, suffix_id, middle_id = map(tokenizer.token_id, names)
    assert token_ids[: token_ids.index(prefix_id)] == ([tokenizer.token_id("<s>")] if has_bos else [])
    assert token_ids[-1] == middle_id
    before = token_ids[token_ids.index(prefix_id) + 1 : token_ids.index(suffix_id)]
    behind = token_ids[token_ids.index(suffix_id) + 1 : -1]
    assert before == tokenizer.encode("the dog", add_special_tokens=False)
    assert "".join(tokenizer.strings(behind)).replace("Ġ", " ").replace("▁", " ") == "jumps over"


@pytest.mark.parametrize("suffix", [" over", "  over", "over", "\nover", "\n\n  over"])
def test_a_suffix_begins_as_it_was_sent(suffix):
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = tokenizer_with(kind, FILL_TOKENS[0], has_bos=True)
        assert tokenizer.decode(tokenizer.encode("a", add_special_tokens=False) + tokenizer.encode_inner(suffix)) == f"a{suffix}"


def test_an_empty_prefix_is_a_gap_at_the_beginning():
    tokenizer = tokenizer_with("byte_level", FILL_TOKENS[0], has_bos=False)
    assert tokenizer.strings(encode_fill(tokenizer, "", "x")) == ["<|fim_prefix|>", "<|fim_suffix|>", "x", "<|fim_middle|>"]


def test_a_tokenizer_that_knows_no_gaps_refuses(byte_level):
    with pytest.raises(UnsupportedParameterError, match="filling in the middle") as caught:
        encode_fill(byte_level, "a", "b")
    assert caught.value.param == "suffix"
    with pytest.raises(UnsupportedParameterError):
        encode_fill(tokenizer_with("byte_fallback", FILL_TOKENS[0][:2], has_bos=True), "a", "b")


def test_the_text_that_is_wrong_is_named():
    tokenizer = tokenizer_with("byte_level", FILL_TOKENS[0], has_bos=False)
    for prefix, suffix, param in (("\ud83d", "b", "prompt"), ("a", "\ud83d", "suffix")):
        with pytest.raises(InvalidParameterError, match="surrogate") as caught:
            encode_fill(tokenizer, prefix, suffix)
        assert caught.value.param == param
