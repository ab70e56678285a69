"""Tools in chat completions: what clients offer, what the model is to call, and calls in answers."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from medusa_core.text.tool_calls import TOOL_NAME
from server.protocol.common import Body, Described, invalid

# Of the API.
MAX_TOOLS = 128


def _check_name(name: str) -> str:
    if not TOOL_NAME.fullmatch(name):
        raise invalid("A name has 1 to 64 letters, digits, underscores and hyphens")
    return name


def _check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise invalid('Input should be the schema of an object, {"type": "object", "properties": {...}}')
    return schema


_OBJECT_SCHEMA = Described({"properties": {"type": {"const": "object"}}})


class FunctionDefinition(Body):
    """parameters: left out for a function that has none. strict: arguments are held to the schema also where calling is the model's
    own choice; where tool_choice enforces a call, they always are."""

    name: Annotated[str, AfterValidator(_check_name), Described({"pattern": f"^({TOOL_NAME.pattern})$"})]
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters), _OBJECT_SCHEMA] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


def _check_kinds(tools: object) -> object:
    """The API has tools that this server does not: that is no wrong value."""
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict) and tool.get("type") in ("custom", "mcp", "web_search"):
            raise PydanticCustomError("unsupported_parameter", "Only tools of type 'function' are supported")
    return tools


def _check_unique(tools: list[Tool]) -> list[Tool]:
    counts = Counter(tool.function.name for tool in tools)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise invalid(f"Names should be unique; {repeated[0]} is there {counts[repeated[0]]} times")
    return tools


Tools: TypeAlias = Annotated[
    list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), BeforeValidator(_check_kinds), AfterValidator(_check_unique)
]


def _check_choice(choice: object) -> object:
    """By hand, so that a wrong choice is one error that says what is possible."""
    match choice:
        case None | "none" | "auto" | "required":
            return choice
        case {"type": "function", "function": {"name": str(), **inner}, **outer} if not inner and not outer:
            return choice
        case {"type": "allowed_tools" | "custom"}:
            raise PydanticCustomError("unsupported_parameter", "Only functions can be chosen; send only the tools that are allowed")
    raise invalid('Input should be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}')


_NAMED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
_CHOICE_SCHEMA = {"anyOf": [{"enum": [None, "none", "auto", "required"]}, _NAMED_SCHEMA]}
ToolChoice: TypeAlias = Annotated[Any, BeforeValidator(_check_choice), WithJsonSchema(_CHOICE_SCHEMA)]


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class FunctionCallDelta(msgspec.Struct, omit_defaults=True):
    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """id, type and the function's name come once, with the first piece of a call."""

    index: int
    function: FunctionCallDelta
    id: str | None = None
    type: str | None = None
