"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the shapes of vLLM, which lm-eval and others read."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field, model_validator

from server.protocol.chat import Message
from server.protocol.common import Body, TokenId, invalid
from server.protocol.tools import Tools


class TokenizeBody(Body):
    """Either a `prompt`, with the tokenizer's own BOS unless `add_special_tokens` is false, or `messages`, rendered by the chat
    template, which writes the special tokens itself."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    # None: true for a prompt, false for messages
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("Exactly one of prompt and messages is needed")
        of_chats = (self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs, self.tools)
        if self.prompt is not None and any(value is not None for value in of_chats):
            raise invalid(
                "add_generation_prompt, continue_final_message, chat_template_kwargs and tools belong to messages, not to a prompt"
            )
        return self


class Tokenized(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class Detokenized(msgspec.Struct):
    prompt: str
