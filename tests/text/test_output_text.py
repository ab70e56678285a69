"""One choice's text: tokens in, deltas out, cut at stop strings, whatever the steps."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from medusa_core.text.chat_template import ChatTemplate
from medusa_core.text.processor import OutputText, TextDelta, TextProcessor

TEXTS = st.text(alphabet=st.sampled_from("ab .你好😀"), max_size=25)
STOPS = st.lists(st.text(alphabet=st.sampled_from("ab .你😀"), min_size=1, max_size=3), max_size=4).map(tuple)


def processor_of(tokenizer) -> TextProcessor:
    return TextProcessor(tokenizer, ChatTemplate(tokenizer.hf_tokenizer))


def push_in_steps(output: OutputText, ids: list[int], cuts: list[int]) -> list[TextDelta]:
    borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    steps = [ids[a:b] for a, b in pairwise(borders)] or [[]]
    return [output.push(step, is_last=i == len(steps) - 1) for i, step in enumerate(steps)]


def expected_with_stop(tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[str, int, bool]:
    """Decode every prefix of the tokens until one shows a stop string, and cut there."""
    for num_tokens in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:num_tokens])
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        if ends:
            return text[: min(ends)[1]], num_tokens, True
    return tokenizer.decode(ids), len(ids), False


@given(text=TEXTS, stop=STOPS, cuts=st.lists(st.integers(0, 100), max_size=8))
def test_text_and_token_count_do_not_depend_on_the_steps(byte_level, byte_fallback, text, stop, cuts):
    for tokenizer in (byte_level, byte_fallback):
        ids = tokenizer.encode(text)
        output = processor_of(tokenizer).new_output(stop=stop, stop_token_ids=frozenset())
        deltas = push_in_steps(output, ids, cuts)
        want = expected_with_stop(tokenizer, ids, stop)
        assert (output.text, output.num_tokens, deltas[-1].stopped) == want
        assert "".join(delta.text for delta in deltas) == output.text
        assert sum(delta.num_tokens for delta in deltas) == output.num_tokens


def test_a_stop_string_over_tokens_and_steps_is_never_sent_in_part(byte_level):
    output = processor_of(byte_level).new_output(stop=("zq😀!",), stop_token_ids=frozenset())
    ids = byte_level.encode("so zq😀! more", add_special_tokens=False)
    deltas = [output.push([token_id], is_last=False) for token_id in ids]
    assert output.text == "so "
    assert deltas[-1] == TextDelta("", 0, stopped=True)
    complete = byte_level.encode("so zq😀!", add_special_tokens=False)
    assert output.num_tokens == len(complete) < len(ids)


def test_a_stop_string_may_stay_in_the_text(byte_level):
    processor = processor_of(byte_level)
    output = processor.new_output(stop=("dog",), include_stop_str_in_output=True, stop_token_ids=frozenset())
    output.push(byte_level.encode("the dog runs"), is_last=True)
    assert output.text == "the dog"


def test_the_end_releases_what_only_looked_like_a_stop_string(byte_level):
    output = processor_of(byte_level).new_output(stop=("dogma",), stop_token_ids=frozenset())
    ids = byte_level.encode("the dog", add_special_tokens=False)
    assert output.push(ids, is_last=False).text == "the "
    assert output.push([], is_last=True) == TextDelta("dog", 0, stopped=False)


def test_a_final_stop_token_counts_but_gives_no_text(byte_level):
    ids = byte_level.encode("the dog", add_special_tokens=False)
    new_output = processor_of(byte_level).new_output
    output = new_output(stop_token_ids=frozenset(ids[-1:]))
    assert output.push(ids, is_last=True).num_tokens == len(ids)
    assert output.text == byte_level.decode(ids[:-1])
    # The same token inside the output, or as the last one of an output cut for length with other stop tokens, is text.
    plain = new_output(stop_token_ids=frozenset({ids[-1] + 1}))
    plain.push(ids, is_last=True)
    assert plain.text == "the dog"


def test_special_tokens_are_text_only_on_request(byte_level):
    ids = byte_level.encode("the<|user|> dog", add_special_tokens=False)
    texts = []
    for skip in (True, False):
        output = processor_of(byte_level).new_output(skip_special_tokens=skip, stop_token_ids=frozenset())
        output.push(ids, is_last=True)
        texts.append(output.text)
    assert texts == ["the dog", "the<|user|> dog"]


def test_ids_outside_the_tokenizer_give_no_text(byte_level):
    output = processor_of(byte_level).new_output(stop_token_ids=frozenset())
    output.push([*byte_level.encode("a"), 99_999, *byte_level.encode("b", add_special_tokens=False)], is_last=True)
    assert output.text == "ab"
