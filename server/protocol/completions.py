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

# As many choices as one request may have; with n, convert.py counts those.
MAX_PROMPTS = 128

Prompt = str | list[str] | list[int] | list[list[int]]


def _are_all(values: list[Any], kind: type) -> bool:
    """Of exactly this type: `True` is no integer. Without a loop of Python's, as a body holds up to a million."""
    return set(map(type, values)) == {kind}


def _check_prompt(value: object) -> object:
    """One check by hand: a union of four shapes would report every element once per shape."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value:
        if _are_all(value, int):
            return value
        if len(value) > MAX_PROMPTS and isinstance(value[0], str | list):
            raise invalid(f"At most {MAX_PROMPTS} prompts are allowed")
        if _are_all(value, str) or (_are_all(value, list) and all(not item or _are_all(item, int) for item in value)):
            return value
    raise invalid("Input should be a string, a list of strings, a list of token ids, or a list of lists of token ids; not empty")


def _list_of(items: dict[str, Any], **keywords: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, **keywords}


_TEXT = {"type": "string"}
_TOKEN_IDS = _list_of({"type": "integer", "minimum": 0})
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        _list_of(_TEXT, maxItems=MAX_PROMPTS),
        _TOKEN_IDS,
        _list_of(_TOKEN_IDS, maxItems=MAX_PROMPTS),
        {"type": "null"},
    ]
}


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
