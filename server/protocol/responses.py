"""`/v1/responses`: body, items, answers and events. Nothing is stored, so each request carries its whole conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.chat import MAX_METADATA, ChatTokenLogprob
from server.protocol.common import (
    Body,
    Described,
    Int32,
    Int64,
    Logprobs,
    MinP,
    NumTokens,
    RepetitionPenalty,
    RequestMetrics,
    Share,
    Speculative,
    Temperature,
    TopK,
    invalid,
    only,
)
from server.protocol.tools import MAX_TOOLS, FunctionDefinition

ITEM_TYPES = ("message", "function_call", "function_call_output")
_TEXT_TYPES = ("input_text", "output_text", "text")
# What an answer's log-probabilities are asked for by. Other names ask for parts of items that this server never makes.
LOGPROBS = "message.output_text.logprobs"


def _as_text(content: object) -> str:
    """The text of a string or of a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("Input should be a string or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_image", "input_file", "input_audio"):
            raise PydanticCustomError(
                "unsupported_parameter", "This model reads text only; content parts must have type 'input_text'"
            )
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*_TEXT_TYPES, "refusal") or not isinstance(text, str):
            raise invalid('Each content part should be {"type": "input_text", "text": "..."}')
        texts.append(text)
    return "".join(texts)


def _part_schema(types: Sequence[str], field: str) -> dict[str, Any]:
    properties = {"type": {"enum": list(types)}, field: {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["type", field]}


_PART_SCHEMA = {"anyOf": [_part_schema(_TEXT_TYPES, "text"), _part_schema(["refusal"], "refusal")]}
_TEXT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}
Text = Annotated[str, BeforeValidator(_as_text), WithJsonSchema(_TEXT_SCHEMA)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _Item(Body):
    """id, status: of items that came from an answer; they change nothing."""

    id: str | None = None
    status: ItemStatus | None = None


class MessageItem(_Item):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    phase: str | None = None


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    # Of calls that other servers answer with; the SDK writes them as null.
    async_: Annotated[Any, only(None)] = None
    caller: Annotated[Any, only(None)] = None
    namespace: Annotated[Any, only(None)] = None


class FunctionOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Text


def _item_tag(item: Any) -> str | None:
    return item.get("type") or "message" if isinstance(item, dict) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(
        _item_tag,
        custom_error_type="unsupported_parameter",
        custom_error_message="Items should be of type 'message', 'function_call' or 'function_call_output'",
    ),
]


class FunctionTool(FunctionDefinition):
    """A function, flat: not inside `function` as in chat completions."""

    type: Literal["function"]


def _check_tool_kinds(tools: object) -> object:
    """The API has tools that this server does not: that is no wrong value."""
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict) and tool.get("type") != "function":
            raise PydanticCustomError("unsupported_parameter", "Only tools of type 'function' are supported")
    return tools


def _check_choice(choice: object) -> object:
    match choice:
        case None | "none" | "auto" | "required":
            return choice
        case {"type": "function", "name": str(), **rest} if not rest:
            return choice
        case {"type": str()}:
            raise PydanticCustomError("unsupported_parameter", "Only functions can be chosen")
    raise invalid('Input should be "none", "auto", "required" or {"type": "function", "name": "..."}')


_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": [None, "none", "auto", "required"]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
            "required": ["type", "name"],
            "additionalProperties": False,
        },
    ]
}


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    # `schema` is a method of pydantic's models
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Body):
    # Padding against traffic analysis; we never pad, which the API allows.
    include_obfuscation: bool | None = None


class ResponsesBody(Body):
    model: str
    input: Annotated[
        list[Item],
        Field(fail_fast=True, min_length=1),
        BeforeValidator(lambda value: [{"role": "user", "content": value}] if isinstance(value, str) else value),
        Described({"type": ["string", "array"]}),
    ]
    instructions: str | None = None
    max_output_tokens: NumTokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS), BeforeValidator(_check_tool_kinds)] | None = (
        None
    )
    tool_choice: Annotated[Any, BeforeValidator(_check_choice), WithJsonSchema(_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: Logprobs | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None

    # Accepted: they carry no promise about the output of a server like this one, which stores nothing and never reasons apart.
    store: bool | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    # Extensions, as in chat completions.
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Int64 | None = None
    repetition_penalty: RepetitionPenalty | None = None
    priority: Int32 | None = None
    speculative: Speculative | None = None

    truncation: Annotated[Any, only(None, "disabled")] = None
    previous_response_id: Annotated[Any, only(None)] = None
    conversation: Annotated[Any, only(None)] = None
    background: Annotated[Any, only(None, False)] = None
    prompt: Annotated[Any, only(None)] = None
    max_tool_calls: Annotated[Any, only(None)] = None
    context_management: Annotated[Any, only(None, [])] = None
    moderation: Annotated[Any, only(None)] = None

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


class OutputText(msgspec.Struct):
    text: str
    logprobs: list[ChatTokenLogprob] = []
    annotations: list[None] = []
    type: Literal["output_text"] = "output_text"


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputCall(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseFailure(msgspec.Struct):
    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The answer so far. What the request asked for is told again, with the defaults that were used."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: Sequence[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    background: bool = False
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]
    metrics: RequestMetrics | msgspec.UnsetType | None = msgspec.UNSET


class StreamEvent(msgspec.Struct, kw_only=True):
    """An event that has a name. sequence_number: from 0, one after the other."""

    type: str
    sequence_number: int


class ResponseEvent(StreamEvent, kw_only=True):
    response: ResponseObject


class ItemEvent(StreamEvent, kw_only=True):
    output_index: int
    item: OutputMessage | OutputCall


class _OfItem(StreamEvent, kw_only=True):
    item_id: str
    output_index: int


class _OfPart(_OfItem, kw_only=True):
    content_index: int = 0


class PartEvent(_OfPart, kw_only=True):
    part: OutputText


class TextDeltaEvent(_OfPart, kw_only=True):
    delta: str
    logprobs: list[ChatTokenLogprob]


class TextDoneEvent(_OfPart, kw_only=True):
    text: str
    logprobs: list[ChatTokenLogprob]


class ArgumentsDeltaEvent(_OfItem, kw_only=True):
    delta: str


class ArgumentsDoneEvent(_OfItem, kw_only=True):
    name: str
    arguments: str


class ErrorEvent(StreamEvent, kw_only=True):
    code: str | None
    message: str
    param: str | None


# All that a stream may hold.
EVENTS = (
    ResponseEvent,
    ItemEvent,
    PartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
)
