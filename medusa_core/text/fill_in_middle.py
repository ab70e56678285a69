"""Prompts for models that were trained to write what stands between two texts."""

from __future__ import annotations

from typing import NamedTuple

from medusa_core.errors import InvalidParameterError, UnsupportedParameterError
from medusa_core.text.tokenizer import Tokenizer


class FillTokens(NamedTuple):
    """The tokens in front of the text before the gap, in front of the text behind it, and in front of what fills it."""

    prefix: str
    suffix: str
    middle: str


FILL_TOKENS = (
    FillTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    FillTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    FillTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FillTokens("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    FillTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)


def encode_fill(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Token ids of a prompt that asks for the text between two texts, each behind its token; in front of all BOS, if there is one.

    Raises UnsupportedParameterError for a tokenizer without a set of tokens that is known here, InvalidParameterError as `encode`
    does.
    """
    for names in FILL_TOKENS:
        prefix_id, suffix_id, middle_id = (tokenizer.token_id(name) for name in names)
        if prefix_id is not None and suffix_id is not None and middle_id is not None:
            before = tokenizer.encode(prefix, add_special_tokens=False)
            try:
                behind = tokenizer.encode_inner(suffix)
            except InvalidParameterError as error:
                raise InvalidParameterError(str(error), param="suffix") from error
            return [*tokenizer.bos(), prefix_id, *before, suffix_id, *behind, middle_id]
    raise UnsupportedParameterError(
        "This model's tokenizer has no tokens for filling in the middle.", param="suffix", hint="Leave the field out."
    )
