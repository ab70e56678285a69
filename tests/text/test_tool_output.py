"""Tool calls in the text of an output, from its tokens."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from medusa_core.text.chat_template import ChatTemplate
from medusa_core.text.processor import TextProcessor
from medusa_core.text.tokenizer import Tokenizer
from medusa_core.text.tool_calls import CallArguments, CallStart
from medusa_core.text.tool_formats import TOOL_FORMATS, find_tool_format
from tests.text.conftest import BUILDERS

HERMES = TOOL_FORMATS["hermes"]
CALL = '<tool_call>\n{"name": "f", "arguments": {"dog": "fox 😀"}}\n</tool_call>'
TEXT = f"the dog\n{CALL}\n{CALL}\nand the fox"


@cache
def processor_with(*, is_special: bool) -> TextProcessor:
    backend = BUILDERS["byte_level"]()
    backend.add_tokens([AddedToken("<tool_call>", special=is_special, normalized=False)])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    return TextProcessor(tokenizer, ChatTemplate(tokenizer.hf_tokenizer))


@pytest.fixture(scope="module", params=[True, False], ids=["special", "ordinary"])
def processor(request):
    return processor_with(is_special=request.param)


def read(processor, steps, **options):
    """(content, calls, number of tokens, whether it was stopped) of an output that comes in these steps."""
    output = processor.new_output(tool_format=HERMES, **options)
    calls, num_tokens, is_stopped = [], 0, False
    for number, step in enumerate(steps, start=1):
        delta = output.push(step, is_last=number == len(steps))
        num_tokens += delta.num_tokens
        is_stopped = delta.stopped
        for event in delta.calls:
            if isinstance(event, CallArguments) and isinstance(calls[-1], CallArguments):
                event = CallArguments(event.call_idx, calls.pop().text + event.text)
            calls.append(event)
    return output.text, calls, num_tokens, is_stopped


def test_calls_are_found_whether_or_not_their_marker_is_a_special_token(processor):
    token_ids = processor.encode(TEXT)
    arguments = '{"dog": "fox 😀"}'
    calls = [CallStart(0, "f"), CallArguments(0, arguments), CallStart(1, "f"), CallArguments(1, arguments)]
    assert read(processor, [token_ids]) == ("the dog\nand the fox", calls, len(token_ids), False)


@given(
    cuts=st.lists(st.integers(0, 200), max_size=20),
    is_single_call=st.booleans(),
    stop=st.sampled_from([(), ("fox",), ("</tool_call>",), ("and",)]),
)
def test_steps_make_no_difference(cuts, is_single_call, stop):
    processor = processor_with(is_special=False)
    token_ids = processor.encode(TEXT)
    ends = sorted({min(cut, len(token_ids)) for cut in cuts} | {len(token_ids)})
    steps = [token_ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    options = {"is_single_call": is_single_call, "stop": stop}
    assert read(processor, steps, **options) == read(processor, [token_ids], **options)


def test_tokens_count_up_to_the_end_of_a_single_call():
    processor = processor_with(is_special=False)
    token_ids = processor.encode(TEXT)
    content, calls, num_tokens, is_stopped = read(processor, [token_ids], is_single_call=True)
    assert (content, len(calls), is_stopped) == ("the dog", 2, True)
    assert processor.decode(token_ids[:num_tokens]).count("}") >= 1
    assert processor.decode(token_ids[: num_tokens - 1]).count("}") == 0


def test_formats_by_name():
    assert find_tool_format("none", "<tool_call> arguments") is None
    assert find_tool_format("auto", "<tool_call> arguments") is HERMES
    assert find_tool_format("auto", "{{ messages }}") is None
    assert find_tool_format("hermes", "{{ messages }}") is HERMES
