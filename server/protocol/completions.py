"""`/v1/completions`: body and answers. The stream uses the same object name as the whole answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, WithJsonSchema

from server.protocol.common import (
    Choices,
    GenerationBody,
    Logprobs,
    OptionalIds,
    OptionalMetrics,
    OptionalUsage,
    invalid,
)

Prompt = str | list[str] | list[int] | list[list[int]]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_prompt(value: object) -> object:
    """One check by hand: a union of four shapes would report every element once per shape."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or all(_is_int(item) for item in value):
            return value
        if all(isinstance(item, list) and all(_is_int(token) for token in item) for item in value):
            return value
    raise invalid("Input should be a string, a list of strings, a list of token ids, or a list of lists of token ids; not empty")


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT = {"type": "string"}
_TOKEN_IDS = _list_of({"type": "integer", "minimum": 0})
_PROMPT_SCHEMA = {"anyOf": [_TEXT, _list_of(_TEXT), _TOKEN_IDS, _list_of(_TOKEN_IDS), {"type": "null"}]}


class CompletionBody(GenerationBody):
    prompt: Annotated[Any, BeforeValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
    # 0 computes the prompt alone, for its log-probabilities
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    best_of: Choices | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None
    # Text that follows on what is to be written; an empty one asks for nothing.
    suffix: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None


class CompletionLogprobs(msgspec.Struct):
    """A list each, with an entry per token. The first token of an echoed prompt follows on nothing: null.

    text_offset: where the token's text starts, in characters. top_logprobs: by token, the token itself included.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: OptionalIds = msgspec.UNSET
    prompt_token_ids: OptionalIds = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OptionalUsage = msgspec.UNSET
    metrics: OptionalMetrics = msgspec.UNSET
