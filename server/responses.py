"""`/v1/responses` in terms of a chat: the request as its body, the answer as items and events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from medusa_core.errors import InvalidParameterError, RequestError
from medusa_core.text import TextProcessor
from medusa_core.text.tool_calls import CallStart
from server.body import validate
from server.convert import Job, chat_job
from server.generation import ChoiceUpdate
from server.logprobs import chat_logprobs
from server.protocol.chat import ChatBody, ChatTokenLogprob
from server.protocol.common import RequestMetrics, Usage
from server.protocol.errors import ErrorObject
from server.protocol.responses import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
    FunctionCallItem,
    FunctionOutputItem,
    IncompleteDetails,
    InputDetails,
    ItemEvent,
    MessageItem,
    OutputCall,
    OutputDetails,
    OutputMessage,
    OutputText,
    PartEvent,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponsesBody,
    ResponseUsage,
    StreamEvent,
    TextDeltaEvent,
    TextDoneEvent,
    TextFormat,
)
from server.replies import FinishedChoice
from server.served_model import ServedModel

# What a chat calls otherwise, for errors that name their field.
_FIELDS = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
_SAME_FIELDS = (
    "model",
    "temperature",
    "top_p",
    "stream",
    "parallel_tool_calls",
    "metadata",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "priority",
    "speculative",
)


def as_chat(body: ResponsesBody) -> ChatBody:
    """The chat completion that gives the same answer. Raises RequestError."""
    fields = body.model_dump(include=set(_SAME_FIELDS), exclude_none=True)
    fields |= {
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "tools": [{"type": "function", "function": _without_type(tool.model_dump(exclude_none=True))} for tool in body.tools or ()],
        "tool_choice": _tool_choice(body.tool_choice),
        "logprobs": body.has_logprobs,
        "top_logprobs": body.top_logprobs,
        "response_format": _response_format(body.text.format if body.text else None),
    }
    with _RenamedFields():
        return validate(fields, ChatBody, allow_unknown=False)


def response_job(body: ChatBody, model: ServedModel, *, request_id: str, arrival_s: float, cache_salt: str = "") -> Job:
    """As `chat_job`, with errors that name the fields of a response."""
    with _RenamedFields():
        return chat_job(body, model, request_id=request_id, arrival_s=arrival_s, cache_salt=cache_salt)


class _RenamedFields:
    """A context manager that makes errors name the field of a response instead of that of a chat."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RequestError) and error.param is not None:
            name = error.param.partition("[")[0].partition(".")[0]
            error.param = _FIELDS.get(name, error.param)


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Items as messages of a chat: calls belong to the assistant's message in front of them, or make one."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    for item in body.input:
        match item:
            case MessageItem():
                messages.append({"role": item.role, "content": item.content})
            case FunctionCallItem():
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case FunctionOutputItem():
                messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
    return messages


def _tool_choice(choice: Any) -> Any:
    return {"type": "function", "function": {"name": choice["name"]}} if isinstance(choice, dict) else choice


def _without_type(tool: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tool.items() if name != "type"}


def _response_format(text_format: TextFormat | None) -> dict[str, Any] | None:
    if text_format is None:
        return None
    given = text_format.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
    if text_format.type == "json_schema":
        return {"type": "json_schema", "json_schema": given}
    if given:
        name = next(iter(given))
        raise InvalidParameterError(f"text.format.{name} is for the type json_schema; leave it out.", param=f"text.format.{name}")
    return {"type": text_format.type}


class ResponseReply:
    """`response` objects and their events. One message at most: text behind a call goes on with the message in front of it."""

    end = b""
    has_usage_chunk = True

    def __init__(self, body: ResponsesBody, reply_id: str, prompts: list[list[int]], text: TextProcessor) -> None:
        self.id = f"resp_{reply_id}"
        self._reply_id = reply_id
        self._has_logprobs = body.has_logprobs
        self._token_bytes: Callable[[int], bytes] = text.token_bytes
        self._number = 0
        # in order; the message, and the call that is being written
        self._items: list[OutputMessage | OutputCall] = []
        self._message: OutputMessage | None = None
        self._call: OutputCall | None = None
        self._response = ResponseObject(
            id=self.id,
            created_at=int(time.time()),
            status="in_progress",
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=body.model,
            output=self._items,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text=_text_config(body),
            tool_choice="auto" if body.tool_choice is None else body.tool_choice,
            tools=[tool.model_dump() for tool in body.tools or ()],
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            user=body.user,
            metadata=body.metadata or {},
        )

    def opening(self, num_choices: int) -> Iterable[msgspec.Struct]:
        for name in ("created", "in_progress"):
            yield ResponseEvent(type=f"response.{name}", sequence_number=self._next(), response=self._response)

    def chunks(self, update: ChoiceUpdate) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        is_empty_answer = update.finish_reason is not None and not (self._items or update.calls)
        if update.text or is_empty_answer:
            events += self._write_text(update)
        elif self._message is not None:
            # of tokens without a text, such as the one that ends the answer
            self._message.content[0].logprobs += self._logprobs(update)
        for call in update.calls:
            if isinstance(call, CallStart):
                events += [*self._end_call("completed"), self._start_call(call.name)]
            elif self._call is not None:
                events.append(self._write_arguments(self._call, call.text))
        if update.finish_reason is not None:
            events += self._finish(update.finish_reason)
        return events

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        self._complete(usage, metrics)
        return ResponseEvent(type=f"response.{self._response.status}", sequence_number=self._next(), response=self._response)

    def failure(self, error: ErrorObject) -> Iterable[msgspec.Struct]:
        yield ErrorEvent(type="error", sequence_number=self._next(), code=error.code, message=error.message, param=error.param)
        self._response.status = "failed"
        self._response.error = ResponseFailure("server_error", error.message)
        yield ResponseEvent(type="response.failed", sequence_number=self._next(), response=self._response)

    def whole(self, choices: list[FinishedChoice], usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        for update in choices[0].updates:
            self.chunks(update)
        self._complete(usage, metrics)
        return self._response

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _write_text(self, update: ChoiceUpdate) -> Iterable[StreamEvent]:
        if self._message is None:
            item = OutputMessage(id=f"msg_{self._reply_id}", status="in_progress", content=[])
            yield self._add(item)
            self._message = item
            item.content = [OutputText("")]
            yield PartEvent(
                type="response.content_part.added",
                sequence_number=self._next(),
                item_id=item.id,
                output_index=self._items.index(item),
                part=OutputText(""),
            )
        part = self._message.content[0]
        logprobs = self._logprobs(update)
        part.text += update.text
        part.logprobs += logprobs
        if update.text:
            yield TextDeltaEvent(
                type="response.output_text.delta",
                sequence_number=self._next(),
                item_id=self._message.id,
                output_index=self._items.index(self._message),
                delta=update.text,
                logprobs=logprobs,
            )

    def _logprobs(self, update: ChoiceUpdate) -> list[ChatTokenLogprob]:
        return chat_logprobs(update.token_ids, update.logprobs, self._token_bytes).content if self._has_logprobs else []

    def _start_call(self, name: str) -> StreamEvent:
        number = uuid.uuid4().hex[:24]
        self._call = OutputCall(id=f"fc_{number}", status="in_progress", call_id=f"call_{number}", name=name, arguments="")
        return self._add(self._call)

    def _write_arguments(self, call: OutputCall, text: str) -> StreamEvent:
        call.arguments += text
        return ArgumentsDeltaEvent(
            type="response.function_call_arguments.delta",
            sequence_number=self._next(),
            item_id=call.id,
            output_index=self._items.index(call),
            delta=text,
        )

    def _end_call(self, status: Any) -> Iterable[StreamEvent]:
        call, self._call = self._call, None
        if call is None:
            return
        call.status = status
        yield ArgumentsDoneEvent(
            type="response.function_call_arguments.done",
            sequence_number=self._next(),
            item_id=call.id,
            output_index=self._items.index(call),
            name=call.name,
            arguments=call.arguments,
        )
        yield self._done(call)

    def _finish(self, reason: str) -> Iterable[StreamEvent]:
        """Everything still open ends; a limit leaves it incomplete."""
        is_cut = reason == "length"
        self._response.status = "incomplete" if is_cut else "completed"
        if is_cut:
            self._response.incomplete_details = IncompleteDetails("max_output_tokens")
        yield from self._end_call(self._response.status)
        if self._message is not None:
            message, part = self._message, self._message.content[0]
            message.status = "incomplete" if is_cut else "completed"
            where: dict[str, Any] = {"item_id": message.id, "output_index": self._items.index(message)}
            yield TextDoneEvent(
                type="response.output_text.done",
                sequence_number=self._next(),
                **where,
                text=part.text,
                logprobs=part.logprobs,
            )
            yield PartEvent(type="response.content_part.done", sequence_number=self._next(), **where, part=part)
            yield self._done(message)

    def _add(self, item: OutputMessage | OutputCall) -> StreamEvent:
        self._items.append(item)
        # a copy: the item is written on before the event is encoded
        return ItemEvent(
            type="response.output_item.added",
            sequence_number=self._next(),
            output_index=len(self._items) - 1,
            item=msgspec.structs.replace(item),
        )

    def _done(self, item: OutputMessage | OutputCall) -> StreamEvent:
        index = self._items.index(item)
        return ItemEvent(type="response.output_item.done", sequence_number=self._next(), output_index=index, item=item)

    def _complete(self, usage: Usage, metrics: RequestMetrics | None) -> None:
        self._response.completed_at = int(time.time())
        self._response.metrics = metrics
        self._response.usage = ResponseUsage(
            usage.prompt_tokens,
            InputDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputDetails(),
            usage.total_tokens,
        )


def _text_config(body: ResponsesBody) -> dict[str, Any]:
    text_format = body.text.format if body.text else None
    return {"format": {"type": "text"} if text_format is None else text_format.model_dump(by_alias=True, exclude_none=True)}
