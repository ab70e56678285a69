"""`/v1/completions`: body and answers. The stream uses the same object name as the whole answer."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import BeforeValidator

from server.protocol.common import GenerationBody, Int32, OptionalIds, OptionalMetrics, OptionalUsage, invalid, only

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


class CompletionBody(GenerationBody):
    prompt: Annotated[Any, BeforeValidator(_check_prompt)]
    best_of: Int32 | None = None

    suffix: Annotated[Any, only(None, "")] = None
    logprobs: Annotated[Any, only(None, False)] = None
    echo: Annotated[Any, only(None, False)] = None


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None
    token_ids: OptionalIds = msgspec.UNSET
    prompt_token_ids: OptionalIds = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OptionalUsage = msgspec.UNSET
    metrics: OptionalMetrics = msgspec.UNSET
