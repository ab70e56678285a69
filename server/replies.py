"""Updates of choices to answers: the two endpoints' whole objects and stream chunks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from server.generation import ChoiceUpdate
from server.protocol.chat import ChatBody, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatMessage
from server.protocol.common import OptionalIds, OptionalMetrics, OptionalUsage, RequestMetrics, Usage
from server.protocol.completions import Completion, CompletionBody, CompletionChoice


@dataclass(slots=True)
class FinishedChoice:
    """A choice of a whole answer, collected from its updates."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Reply(Protocol):
    """How one endpoint words its answers. Each returned object is one JSON body or one frame."""

    def opening(self, num_choices: int) -> Iterable[msgspec.Struct]:
        """Chunks sent before any text."""
        ...

    def chunks(self, update: ChoiceUpdate) -> Iterable[msgspec.Struct]: ...

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        """The last chunk of a stream whose client asked for usage."""
        ...

    def whole(self, choices: list[FinishedChoice], usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct: ...


class CompletionReply:
    """`text_completion` objects."""

    def __init__(self, body: CompletionBody, reply_id: str, prompts: list[list[int]]) -> None:
        self._id = f"cmpl-{reply_id}"
        self._model = body.model
        self._created = int(time.time())
        self._no_usage: OptionalUsage = None if body.is_usage_streamed else msgspec.UNSET
        self._has_ids = bool(body.return_token_ids)
        # by choice, for those that were not told yet
        choices = (prompt for prompt in prompts for _ in range(body.n or 1))
        self._prompts = dict(enumerate(choices)) if self._has_ids else {}

    def opening(self, num_choices: int) -> Iterable[msgspec.Struct]:
        return ()

    def chunks(self, update: ChoiceUpdate) -> Iterable[msgspec.Struct]:
        choice = self._choice(update.index, update.text, update.finish_reason, update.token_ids)
        return (self._object([choice], self._no_usage),)

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        return self._object([], usage, metrics)

    def whole(self, choices: list[FinishedChoice], usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        answers = [self._choice(index, choice.text, choice.finish_reason, choice.token_ids) for index, choice in enumerate(choices)]
        return self._object(answers, usage, metrics)

    def _choice(self, index: int, text: str, finish_reason: str | None, token_ids: list[int]) -> CompletionChoice:
        if not self._has_ids:
            return CompletionChoice(index, text, finish_reason)
        prompt = self._prompts.pop(index, msgspec.UNSET)
        return CompletionChoice(index, text, finish_reason, token_ids=token_ids, prompt_token_ids=prompt)

    def _object(
        self, choices: list[CompletionChoice], usage: OptionalUsage, metrics: OptionalMetrics = msgspec.UNSET
    ) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, metrics=metrics)


class ChatReply:
    """`chat.completion` objects and `chat.completion.chunk` frames.

    The role comes once per choice, before any text and in index order: the SDK appends choices in the order it sees them.
    """

    def __init__(self, body: ChatBody, reply_id: str, prompts: list[list[int]]) -> None:
        self._id = f"chatcmpl-{reply_id}"
        self._model = body.model
        self._created = int(time.time())
        self._no_usage: OptionalUsage = None if body.is_usage_streamed else msgspec.UNSET
        # We have one tier; the API wants it named when the client names one.
        self._tier: str | msgspec.UnsetType = "default" if body.service_tier else msgspec.UNSET
        self._has_ids = bool(body.return_token_ids)
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
        if update.finish_reason is not None:
            choices.append(ChatChunkChoice(update.index, ChatDelta(), update.finish_reason))
        if self._has_ids:
            choices[0].token_ids = update.token_ids
        return [self._chunk([choice], self._no_usage) for choice in choices]

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        return self._chunk([], usage, metrics)

    def whole(self, choices: list[FinishedChoice], usage: Usage, metrics: RequestMetrics | None) -> msgspec.Struct:
        answers = [
            ChatChoice(
                index,
                ChatMessage(choice.text),
                choice.finish_reason,
                token_ids=choice.token_ids if self._has_ids else msgspec.UNSET,
            )
            for index, choice in enumerate(choices)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=answers,
            usage=usage,
            metrics=metrics,
            service_tier=self._tier,
            prompt_token_ids=self._prompt_ids,
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: OptionalUsage, metrics: OptionalMetrics = msgspec.UNSET) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            metrics=metrics,
            service_tier=self._tier,
        )
