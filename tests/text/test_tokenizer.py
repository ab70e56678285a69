"""The bytes of single tokens."""

from __future__ import annotations

import pytest

from tests.text.conftest import CORPUS

TEXTS = ["the dog does not mind the fox", "def main(argument): return argument", *CORPUS]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_make_the_text(byte_level, byte_fallback, text):
    """Also where a character takes several tokens."""
    for tokenizer in (byte_level, byte_fallback):
        data = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False)))
        assert data.decode().removeprefix(" ") == text


@pytest.mark.parametrize("text", TEXTS[:2])
def test_tokenizers_of_words_give_their_texts_too(any_tokenizer, text):
    token_ids = any_tokenizer.encode(text, add_special_tokens=False)
    data = b"".join(map(any_tokenizer.token_bytes, token_ids))
    # decoders put some spaces where there were none ("main ( argument )"), and tidy some of them up
    assert data.decode().replace(" ", "") == any_tokenizer.decode(token_ids).replace(" ", "") == text.replace(" ", "")


def test_special_tokens_are_spelt_and_unknown_ids_are_empty(any_tokenizer):
    tokenizer = any_tokenizer.hf_tokenizer
    assert any_tokenizer.token_bytes(tokenizer.convert_tokens_to_ids("<|user|>")) == b"<|user|>"
    assert any_tokenizer.token_bytes(len(tokenizer) + 5) == b""
