"""The formats of tool calls, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from medusa_core.text.hermes import OPEN, HermesParser, hermes_grammar, is_hermes
from medusa_core.text.tool_calls import ToolCallParser, ToolFunction


class NewParser(Protocol):
    """offered: names of the functions. is_single: the answer ends with its first call. is_held: it keeps to a grammar of text with
    calls; the parser finds no calls but those that the grammar holds to their schema."""

    def __call__(self, *, offered: Collection[str], is_single: bool, is_held: bool) -> ToolCallParser: ...


class WriteGrammar(Protocol):
    """Lark text of an answer of one or more calls, or exactly one. has_marker_tokens: `ToolFormat.marker` is one token.
    answer_schema: or of JSON. text_tokens: or of any text, with calls in it; tokens, by id, that may be there beside plain ones."""

    def __call__(
        self,
        functions: Sequence[ToolFunction],
        *,
        is_single: bool,
        has_marker_tokens: bool,
        answer_schema: Mapping[str, Any] | None = None,
        text_tokens: Mapping[int, str] | None = None,
    ) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """How a family of models writes tool calls.

    is_of: whether a chat template asks the model for this format. marker: what every call begins with.
    """

    is_of: Callable[[str], bool]
    new_parser: NewParser
    grammar: WriteGrammar
    marker: str


TOOL_FORMATS = {
    "hermes": ToolFormat(is_of=is_hermes, new_parser=HermesParser, grammar=hermes_grammar, marker=OPEN),
}


def find_tool_format(name: str, chat_template: str) -> ToolFormat | None:
    """The format by its name; "auto": the first one that the chat template asks for; "none", or nothing found: None."""
    if name == "auto":
        return next((one for one in TOOL_FORMATS.values() if one.is_of(chat_template)), None)
    return None if name == "none" else TOOL_FORMATS[name]
