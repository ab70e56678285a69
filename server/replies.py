"""Updates of choices to answers: the two endpoints' whole objects and stream chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from medusa_core.outputs import TokenLogprob
from medusa_core.text import TextProcessor
from medusa_core.text.tool_calls import CallEvent, CallStart
from server.generation import ChoiceUpdate
from server.logprobs import CompletionLogprobWriter, chat_logprobs
from server.protocol.chat import (
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from server.protocol.common import OptionalIds, OptionalMetrics, OptionalUsage, RequestMetrics, Usage
from server.protocol.completions import Completion, CompletionBody, CompletionChoice
from server.protocol.errors import ErrorBody, ErrorObject
from server.protocol.tools import FunctionCall, FunctionCallDelta, ToolCall, ToolCallDelta


@dataclass(slots=True)
class FinishedChoice:
    """A choice of a whole answer, collected from its updates."""

    updates: list[ChoiceUpdate] = field(default_factory=list)

    def add(self, update: ChoiceUpdate) -> None:
        self.updates.append(update)

    def as_update(self, index: int) -> ChoiceUpdate:
        """All of it at once."""
        return ChoiceUpdate(
            index,
            "".join([update.text for update in self.updates]),
            self.updates[-1].finish_reason if self.updates else None,
            [token_id for update in self.updates for token_id in update.token_ids],
            [entry for update in self.updates for entry in update.logprobs],
            [entry for update in self.updates for entry in update.prompt_logprobs],
            [call for update in self.updates for call in update.calls],
        )


DONE = b"data: [DONE]\n\n"


class Reply(Protocol):
    """How one endpoint words its answers. Each returned object is one JSON body or one frame. id: of the answer, which all of them
    carry. end: what a stream ends with, behind all frames. has_usage_chunk: whether it tells usage before that."""

    @property
    def id(self) -> str: ...

    @property
    def end(self) -> bytes: ...

    @property
    def has_usage_chunk(self) -> bool: ...

    def opening(self, num_choices: int) -> Iterable[msgspec.Struct]:
        """Chunks sent before any text."""
        ...

    def chunks(self, update: ChoiceUpdate) -> Iterable[msgspec.Struct]: ...

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        """The last chunk of a stream that tells usage."""
        ...

    def failure(self, error: ErrorObject) -> Iterable[msgspec.Struct]:
        """The last chunks of a stream that fails."""
        ...

    def whole(self, choices: list[FinishedChoice], usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct: ...


class _DoneReply:
    """Streams that end with `[DONE]`."""

    end = DONE

    def __init__(self, body: CompletionBody | ChatBody) -> None:
        self.has_usage_chunk = body.is_usage_streamed

    def failure(self, error: ErrorObject) -> Iterable[msgspec.Struct]:
        return (ErrorBody(error),)


class CompletionReply(_DoneReply):
    """`text_completion` objects."""

    def __init__(self, body: CompletionBody, reply_id: str, prompts: list[list[int]], text: TextProcessor) -> None:
        super().__init__(body)
        self.id = f"cmpl-{reply_id}"
        self._model = body.model
        self._created = int(time.time())
        self._no_usage: OptionalUsage = None if body.is_usage_streamed else msgspec.UNSET
        self._body = body
        self._text = text
        # by choice, for those that were not told yet
        self._prompts = dict(enumerate((number, ids) for number, ids in enumerate(prompts) for _ in range(body.n or 1)))
        self._writers = {index: CompletionLogprobWriter(text.token_bytes, self._is_hidden) for index in self._prompts}

    def opening(self, num_choices: int) -> Iterable[msgspec.Struct]:
        return ()

    def chunks(self, update: ChoiceUpdate) -> Iterable[msgspec.Struct]:
        return (self._object([self._choice(update)], self._no_usage),)

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        return self._object([], usage, metrics)

    def whole(self, choices: list[FinishedChoice], usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        answers = [self._choice(choice.as_update(index)) for index, choice in enumerate(choices)]
        return self._object(answers, usage, metrics)

    def _choice(self, update: ChoiceUpdate) -> CompletionChoice:
        """With the prompt, where it is echoed, in front of the first text."""
        choice = CompletionChoice(update.index, update.text, update.finish_reason)
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        if update.index in self._prompts:
            number, prompt_ids = self._prompts.pop(update.index)
            if self._body.return_token_ids:
                choice.prompt_token_ids = prompt_ids
            if self._body.echo:
                choice.text = self._prompt_text(number, prompt_ids) + choice.text
                token_ids, logprobs = prompt_ids, [None, *update.prompt_logprobs]
        if self._body.return_token_ids:
            choice.token_ids = update.token_ids
        if self._body.num_logprobs is not None:
            writer = self._writers[update.index]
            choice.logprobs = writer.write([*token_ids, *update.token_ids], [*logprobs, *update.logprobs], text=choice.text)
        return choice

    def _prompt_text(self, number: int, token_ids: list[int]) -> str:
        """As it was sent, if it was a text."""
        prompt = self._body.prompt
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt[number], str):
            return str(prompt[number])
        return self._text.decode(token_ids, skip_special_tokens=self._body.skip_special_tokens is not False)

    def _is_hidden(self, token_id: int) -> bool:
        return self._body.skip_special_tokens is not False and not self._text.decode([token_id])

    def _object(
        self, choices: list[CompletionChoice], usage: OptionalUsage, metrics: OptionalMetrics = msgspec.UNSET
    ) -> Completion:
        return Completion(id=self.id, created=self._created, model=self._model, choices=choices, usage=usage, metrics=metrics)


class ChatReply(_DoneReply):
    """`chat.completion` objects and `chat.completion.chunk` frames.

    The role comes once per choice, before any text and in index order: the SDK appends choices in the order it sees them.
    """

    def __init__(self, body: ChatBody, reply_id: str, prompts: list[list[int]], text: TextProcessor) -> None:
        super().__init__(body)
        self.id = f"chatcmpl-{reply_id}"
        self._model = body.model
        self._created = int(time.time())
        self._no_usage: OptionalUsage = None if body.is_usage_streamed else msgspec.UNSET
        # We have one tier; the API wants it named when the client names one.
        self._tier: str | msgspec.UnsetType = "default" if body.service_tier else msgspec.UNSET
        self._has_ids = bool(body.return_token_ids)
        self._has_logprobs = body.num_logprobs is not None
        self._text = text
        self._prompt_ids: OptionalIds = prompts[0] if self._has_ids else msgspec.UNSET

    def opening(self, num_choices: int) -> Iterable[msgspec.Struct]:
        prompt_ids = self._prompt_ids
        for index in range(num_choices):
            chunk = self._chunk([ChatChunkChoice(index, ChatDelta(role="assistant", content=""))], self._no_usage)
            # once, with the first
            chunk.prompt_token_ids, prompt_ids = prompt_ids, msgspec.UNSET
            yield chunk

    def chunks(self, update: ChoiceUpdate) -> Iterable[msgspec.Struct]:
        choices = []
        if update.text:
            choices.append(ChatChunkChoice(update.index, ChatDelta(content=update.text)))
        choices += [ChatChunkChoice(update.index, ChatDelta(tool_calls=[_call_delta(call)])) for call in update.calls]
        if update.finish_reason is not None:
            choices.append(ChatChunkChoice(update.index, ChatDelta(), update.finish_reason))
        if self._has_ids:
            choices[0].token_ids = update.token_ids
        choices[0].logprobs = self._logprobs(update)
        return [self._chunk([choice], self._no_usage) for choice in choices]

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        return self._chunk([], usage, metrics)

    def whole(self, choices: list[FinishedChoice], usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        answers = [
            ChatChoice(
                update.index,
                _message(update),
                update.finish_reason or "",
                logprobs=self._logprobs(update),
                token_ids=update.token_ids if self._has_ids else msgspec.UNSET,
            )
            for update in (choice.as_update(index) for index, choice in enumerate(choices))
        ]
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=answers,
            usage=usage,
            metrics=metrics,
            service_tier=self._tier,
            prompt_token_ids=self._prompt_ids,
        )

    def _logprobs(self, update: ChoiceUpdate) -> ChatLogprobs | None:
        return chat_logprobs(update.token_ids, update.logprobs, self._text.token_bytes) if self._has_logprobs else None

    def _chunk(self, choices: list[ChatChunkChoice], usage: OptionalUsage, metrics: OptionalMetrics = msgspec.UNSET) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            metrics=metrics,
            service_tier=self._tier,
        )


def _message(update: ChoiceUpdate) -> ChatMessage:
    calls: list[ToolCall] = []
    for event in update.calls:
        if isinstance(event, CallStart):
            calls.append(ToolCall(_new_call_id(), FunctionCall(event.name, "")))
        else:
            calls[event.call_idx].function.arguments += event.text
    return ChatMessage(update.text or None, tool_calls=calls) if calls else ChatMessage(update.text)


def _call_delta(event: CallEvent) -> ToolCallDelta:
    """The name comes with empty arguments: not every client reads more from the first piece."""
    if isinstance(event, CallStart):
        return ToolCallDelta(event.call_idx, FunctionCallDelta("", event.name), id=_new_call_id(), type="function")
    return ToolCallDelta(event.call_idx, FunctionCallDelta(event.text))


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
