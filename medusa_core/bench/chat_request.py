"""Requests for chat completions as a stream, and what their answers say. Parsed after the answer is complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from medusa_core.bench.http_stream import Answer, StreamError
from medusa_core.bench.records import RequestRecord

PATH = "/v1/chat/completions"
_DONE = b"[DONE]"
_MAX_MESSAGE = 200


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int = 0


class _Frame(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Frame)


def chat_body(text: str, *, model: str, max_tokens: int, extra: Mapping[str, Any]) -> bytes:
    """extra: further fields of the body, e.g. temperature."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body | dict(extra))


def read_answer(answer: Answer, record: RequestRecord) -> None:
    """Fill the record from the stream. Raises StreamError where the request failed, was cut short, or states no usage.

    A frame counts as a delivery if it has text; the last one, with the finish reason only, counts if no other did (the first token
    may be one without text, such as EOS).
    """
    if answer.status != 200:
        raise StreamError(f"HTTP {answer.status}: {_error_message(answer.body)}")
    if not answer.events or answer.events[-1][1] != _DONE:
        raise StreamError("The stream ended without [DONE].")
    usage: _Usage | None = None
    finish_s: float | None = None
    for time_s, data in answer.events[:-1]:
        frame = _decode(data)
        if frame.error:
            raise StreamError(f"An error in the stream: {_error_message(data)}")
        usage = frame.usage or usage
        for choice in frame.choices or ():
            if choice.delta is not None and (choice.delta.content or choice.delta.reasoning_content or choice.delta.tool_calls):
                record.frame_times_s.append(time_s)
            if choice.finish_reason:
                finish_s = time_s
    if finish_s is None:
        raise StreamError("The stream ended without a finish reason.")
    if usage is None:
        raise StreamError("The stream states no usage.")
    record.frame_times_s = record.frame_times_s or [finish_s]
    record.num_frames = len(answer.events)
    record.end_s = answer.events[-1][0]
    record.num_output_tokens = usage.completion_tokens
    record.num_prompt_tokens = usage.prompt_tokens


def _decode(data: bytes) -> _Frame:
    try:
        return _DECODER.decode(data)
    except msgspec.ValidationError as error:
        raise StreamError(f"A frame of the stream is no chat completion chunk: {error}.") from error
    except msgspec.DecodeError as error:
        raise StreamError("A frame of the stream is not JSON.") from error


def _error_message(body: bytes) -> str:
    """The message of an API error, else the start of the body."""
    try:
        error = msgspec.json.decode(body)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (msgspec.DecodeError, KeyError, TypeError):
        message = body.decode("utf-8", "replace")
    return str(message)[:_MAX_MESSAGE]
