"""Text deltas add up to what the tokenizer decodes at once, for every kind of decoder."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medusa_core.text.detokenizer import Detokenizer

REPLACEMENT = "\ufffd"
TEXTS = st.text(alphabet=st.sampled_from("ab  .,'the\n\t#é你好世😀👩‍👧🇩🇪ก"), max_size=30)


def detokenizer_of(tokenizer, **options) -> Detokenizer:
    return Detokenizer(tokenizer.decode, byte_values=tokenizer.byte_values, piece_texts=tokenizer.piece_texts(), **options)


def deltas_of(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(text=TEXTS)
def test_deltas_of_a_text_add_up_to_its_decoding(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert "".join(deltas_of(detokenizer_of(any_tokenizer), ids)) == any_tokenizer.decode(ids)


@given(data=st.data())
def test_deltas_of_arbitrary_tokens_add_up_to_their_decoding(any_tokenizer, data):
    ordinary = [i for i in range(len(any_tokenizer.hf_tokenizer)) if i not in any_tokenizer.byte_values]
    ids = data.draw(st.lists(st.sampled_from(ordinary), max_size=30))
    assert "".join(deltas_of(detokenizer_of(any_tokenizer), ids)) == any_tokenizer.decode(ids)


@given(data=st.data())
def test_special_tokens_are_shown_on_request(any_tokenizer, data):
    ids = data.draw(st.lists(st.sampled_from([*any_tokenizer.encode("the dog"), *any_tokenizer.encode("</s><|user|>")])))
    decode = partial(any_tokenizer.decode, skip_special_tokens=False)
    pieces = any_tokenizer.piece_texts(skip_special_tokens=False)
    detokenizer = Detokenizer(decode, byte_values=any_tokenizer.byte_values, piece_texts=pieces)
    assert "".join(deltas_of(detokenizer, ids)) == decode(ids)


@given(text=TEXTS)
def test_no_delta_of_a_valid_text_holds_part_of_a_character(byte_level, byte_fallback, text):
    for tokenizer in (byte_level, byte_fallback):
        assert REPLACEMENT not in "".join(deltas_of(detokenizer_of(tokenizer), tokenizer.encode(text)))


@given(prompt=TEXTS, text=TEXTS, cut=st.integers(0, 40))
@example(prompt="a" * 19, text="a" * 10 + "." * 8 + " ", cut=39)  # a prompt that ends in unknown tokens, which have no text
def test_an_output_that_continues_a_prompt_reads_on_from_it(any_tokenizer, prompt, text, cut):
    ids = any_tokenizer.encode(prompt + text)
    prompt_ids, output_ids = ids[:cut], ids[cut:]
    whole, before = any_tokenizer.decode(ids), any_tokenizer.decode(prompt_ids)
    if REPLACEMENT in before or not before.strip():
        return
    detokenizer = detokenizer_of(any_tokenizer, prompt_token_ids=prompt_ids)
    assert before + "".join(deltas_of(detokenizer, output_ids)) == whole


def test_an_output_completes_the_character_in_which_its_prompt_ends(byte_level):
    ids = byte_level.encode("a ก", add_special_tokens=False)
    detokenizer = detokenizer_of(byte_level, prompt_token_ids=ids[:-1])
    assert "".join(deltas_of(detokenizer, ids[-1:])) == "ก"


def test_the_space_of_a_first_token_depends_on_the_prompt(byte_fallback):
    ids = byte_fallback.encode("the dog", add_special_tokens=False)
    dog = byte_fallback.encode("dog", add_special_tokens=False)
    prompt = ids[: len(ids) - len(dog)]
    assert "".join(deltas_of(detokenizer_of(byte_fallback), dog)) == "dog"
    assert "".join(deltas_of(detokenizer_of(byte_fallback, prompt_token_ids=prompt), dog)) == " dog"


def test_a_skipped_special_token_does_not_swallow_the_next_space(byte_fallback):
    the, eos, dog = (byte_fallback.encode(t, add_special_tokens=False) for t in ("the", "</s>", "dog"))
    assert "".join(deltas_of(detokenizer_of(byte_fallback), the + eos * 10 + dog)) == "the dog"


def test_unfinished_bytes_show_as_replacement_characters_at_the_end_only(byte_level, byte_fallback):
    for tokenizer in (byte_level, byte_fallback):
        ids = tokenizer.encode("aก", add_special_tokens=False)[:-1]
        *pushed, flushed = deltas_of(detokenizer_of(tokenizer), ids)
        assert REPLACEMENT not in "".join(pushed)
        assert flushed.strip(REPLACEMENT) == ""
        assert "".join(pushed) + flushed == tokenizer.decode(ids)


def test_characters_sent_stay_when_their_byte_run_turns_invalid(byte_fallback):
    id_of = {value: token_id for token_id, value in byte_fallback.byte_values.items()}
    ids = [id_of[byte] for byte in "ก".encode() + b"\xff"]
    assert deltas_of(detokenizer_of(byte_fallback), ids) == ["", "", "ก", "", REPLACEMENT]


def test_each_character_of_a_byte_run_is_sent_when_it_is_complete(byte_fallback):
    id_of = {value: token_id for token_id, value in byte_fallback.byte_values.items()}
    ids = [id_of[byte] for byte in "กข".encode()]
    assert deltas_of(detokenizer_of(byte_fallback), ids) == ["", "", "ก", "", "", "ข", ""]


@pytest.mark.parametrize("text", [b"\x80" * 400, b"\xe0" * 400, "😀".encode() * 100, b"plain text " * 40])
def test_work_per_token_does_not_grow_with_the_output(byte_level, text):
    num_decoded = 0

    def decode(ids):
        nonlocal num_decoded
        num_decoded += len(ids)
        return byte_level.decode(ids)

    to_id = byte_level.hf_tokenizer.convert_tokens_to_ids
    letter_of = _letters_of_bytes()
    ids = [to_id(letter_of[byte]) for byte in text]
    assert "".join(deltas_of(Detokenizer(decode), ids)) == byte_level.decode(ids)
    assert num_decoded <= 32 * len(ids)


def _letters_of_bytes() -> dict[int, str]:
    """How byte-level vocabularies spell each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)}
