"""`/v1/chat/completions`: body, messages and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.common import (
    Body,
    GenerationBody,
    Logprobs,
    NumTokens,
    OptionalIds,
    OptionalMetrics,
    OptionalUsage,
    invalid,
    only,
)
from server.protocol.tools import ToolCall, ToolCallDelta, ToolChoice, Tools


def _check_content(value: object) -> object:
    """A string, or a list of text parts, checked by hand so that a wrong part is one error that says what is possible."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid("Input should be a string or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "file", "refusal"):
            raise PydanticCustomError("unsupported_parameter", "This model reads text only; content parts must have type 'text'")
        if kind != "text" or not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise invalid('Each content part should be {"type": "text", "text": "..."}')
    return value


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMAS = [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]

Content = Annotated[Any, BeforeValidator(_check_content), WithJsonSchema({"anyOf": _CONTENT_SCHEMAS})]
OptionalContent = Annotated[
    Any,
    BeforeValidator(lambda value: None if value is None else _check_content(value)),
    WithJsonSchema({"anyOf": [*_CONTENT_SCHEMAS, {"type": "null"}]}),
]


class SystemMessage(Body):
    role: Literal["system"]
    content: Content
    name: str | None = None


class DeveloperMessage(Body):
    role: Literal["developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class PastFunctionCall(Body):
    name: str
    arguments: str


class PastToolCall(Body):
    id: str
    type: Literal["function"]
    function: PastFunctionCall


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: OptionalContent = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[PastToolCall], Field(fail_fast=True)] | None = None
    audio: Annotated[Any, only(None)] = None
    function_call: Annotated[Any, only(None)] = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


# Of the API.
MAX_METADATA = 16

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Annotated[SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Prediction(Body):
    """Text that the output may repeat, such as a file to be edited: it is drafted from, and changes no token."""

    type: Literal["content"]
    content: Content


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: NumTokens | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prediction: Prediction | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    # False: the answer ends with its first call.
    parallel_tool_calls: bool | None = None

    # Accepted: they carry no promise about the output of a server like this one.
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    functions: Annotated[Any, only(None, [])] = None
    function_call: Annotated[Any, only(None, "none", "auto")] = None
    modalities: Annotated[Any, only(None, ["text"])] = None
    audio: Annotated[Any, only(None)] = None
    moderation: Annotated[Any, only(None)] = None
    web_search_options: Annotated[Any, only(None)] = None
    # Added by vllm-router, as above. No reasoning is told apart here, so there is none to keep out of the content.
    separate_reasoning: Annotated[Any, only(None, True)] = None
    stream_reasoning: Annotated[Any, only(None, True)] = None
    include_reasoning: Annotated[Any, only(None, True)] = None

    @property
    def has_callable_tools(self) -> bool:
        """Whether the model may call tools. With tool_choice "none" it is not even told of them."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def has_free_choice(self) -> bool:
        """Whether calls are the model's own decision."""
        return self.tool_choice in (None, "auto")

    @property
    def has_strict_tools(self) -> bool:
        return any(tool.function.strict for tool in self.tools or ())

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(msgspec.Struct):
    """bytes: of the token in UTF-8, as it may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    """content: null where there are only tool calls."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    token_ids: OptionalIds = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: OptionalUsage
    metrics: OptionalMetrics
    service_tier: str | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: OptionalIds = msgspec.UNSET


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: OptionalIds = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: OptionalUsage = msgspec.UNSET
    metrics: OptionalMetrics = msgspec.UNSET
    service_tier: str | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: OptionalIds = msgspec.UNSET
