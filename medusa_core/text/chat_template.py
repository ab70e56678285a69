"""Chat messages to the prompt text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from medusa_core.errors import ConfigError, InvalidParameterError

# Arguments of the renderer itself: template variables by these names would change how it works, or supply another template.
_RESERVED_VARIABLES = frozenset(
    {
        "self", "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
        "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "sanitize_control_tokens",
    }
)  # fmt: skip


class ChatTemplate:
    """A model's chat template, or the one that an operator put in its place."""

    def __init__(self, hf_tokenizer: Any, template: str | None = None) -> None:
        """`template`: Jinja text that replaces the model's own. Raises ConfigError if it does not compile."""
        self._hf_tokenizer = hf_tokenizer
        self._template = template
        if template is not None:
            self._check_syntax()

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Prompt text, special tokens included as text. Raises InvalidParameterError."""
        self._check_arguments(messages, add_generation_prompt, continue_final_message, variables)
        knows_developer = "developer" in self.text
        try:
            rendered: str = self._hf_tokenizer.apply_chat_template(
                [_normalise(message, keep_developer=knows_developer) for message in messages],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            # Templates refuse messages with raise_exception, or trip over a shape they did not expect.
            raise InvalidParameterError(f"The model's chat template refused the messages: {error}", param="messages") from error
        return rendered

    @property
    def source(self) -> str | dict[str, str] | None:
        """The template, or several by name; None if there is none."""
        source: str | dict[str, str] | None = self._template or self._hf_tokenizer.chat_template
        return source

    @property
    def text(self) -> str:
        """The template's source; with several named templates, all of them; empty if there is none."""
        source = self.source or ""
        return "\n".join(source.values()) if isinstance(source, dict) else source

    def _check_arguments(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> None:
        if not self.source:
            raise InvalidParameterError(
                "This model has no chat template.",
                param="messages",
                hint="Use /v1/completions, or start the server with --chat-template.",
            )
        if not messages:
            raise InvalidParameterError("messages must hold at least one message.", param="messages")
        if add_generation_prompt and continue_final_message:
            raise InvalidParameterError(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false.",
                param="continue_final_message",
            )
        reserved = sorted(_RESERVED_VARIABLES & variables.keys())
        if reserved:
            raise InvalidParameterError(f"chat_template_kwargs must not set {', '.join(reserved)}.", param="chat_template_kwargs")

    def _check_syntax(self) -> None:
        try:
            self._hf_tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=self._template, tokenize=False)
        except TemplateSyntaxError as error:
            raise ConfigError(f"--chat-template is not valid Jinja: {error}") from error
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError):
            # It compiles, and just wants other messages than this one.
            return


def read_chat_template(text_or_path: str) -> str:
    """Text of the option --chat-template, which is a file's path or the Jinja text itself. Raises ConfigError."""
    if "{{" in text_or_path or "{%" in text_or_path:
        return text_or_path
    try:
        return Path(text_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template: {error}.", hint="Give the path of a readable file, or Jinja text with {{ }} or {% %} in it."
        ) from error


def _normalise(message: Mapping[str, Any], *, keep_developer: bool) -> dict[str, Any]:
    """Absent for null, one string for a list of text parts, and system for developer where the template knows no such role."""
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(_text_of_part(part) for part in plain["content"])
    if plain.get("role") == "developer" and not keep_developer:
        plain["role"] = "system"
    return plain


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InvalidParameterError("messages may hold only text parts: this model reads text.", param="messages")
    return text
