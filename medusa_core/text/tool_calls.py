"""Tool calls in a model's text, whatever their format: the functions offered, and what a parser tells of calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

# Of the API. What a model writes by another name is no call.
MAX_NAME_CHARS = 64
TOOL_NAME = re.compile(rf"[a-zA-Z0-9_-]{{1,{MAX_NAME_CHARS}}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFunction:
    """A function that a model may call. parameters: the JSON schema of an object."""

    name: str
    parameters: Mapping[str, Any]


class CallStart(NamedTuple):
    """A call begins. call_idx: among the calls of the answer, from 0."""

    call_idx: int
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments, as the model wrote them."""

    call_idx: int
    text: str


CallEvent: TypeAlias = CallStart | CallArguments


class ToolCallParser(Protocol):
    """Tells content from calls while an answer is written. What it tells in total depends on the text, not on its pieces."""

    @property
    def has_calls(self) -> bool:
        """There are calls, and none was broken off."""
        ...

    @property
    def is_finished(self) -> bool:
        """All calls that were allowed are there; further text is ignored."""
        ...

    def push(self, text: str) -> Sequence[str | CallEvent]:
        """What is certain after this text: content, as strings, and calls. What may be the beginning of a call is held back."""
        ...

    def flush(self) -> Sequence[str | CallEvent]:
        """What was held back, at the end of the answer."""
        ...
