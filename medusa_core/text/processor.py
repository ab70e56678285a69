"""`TextProcessor`: text to tokens for requests, tokens to text for answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from medusa_core.errors import InvalidParameterError
from medusa_core.text.chat_template import ChatTemplate, read_chat_template
from medusa_core.text.detokenizer import Detokenizer
from medusa_core.text.fill_in_middle import encode_fill
from medusa_core.text.stop_strings import StopMatcher
from medusa_core.text.tokenizer import Tokenizer
from medusa_core.text.tool_calls import CallArguments, CallEvent, ToolCallParser
from medusa_core.text.tool_formats import ToolFormat


class TextDelta(NamedTuple):
    """What one push adds to an output.

    num_tokens: how many of the pushed tokens belong to the output. After a stop string, those up to and including the token
        that completed it: the model generated it, so usage counts it, although its text may be trimmed.
    stopped: a stop string, or the last tool call allowed, ended the output here; later tokens are not part of it.
    calls: of tool calls, which are no part of `text`.
    """

    text: str
    num_tokens: int
    stopped: bool
    calls: Sequence[CallEvent] = ()


class OutputText:
    """The text of one choice, built from its tokens. `text` and `num_tokens` are the totals of the deltas returned."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        matcher: StopMatcher,
        stop_token_ids: frozenset[int],
        tool_parser: ToolCallParser | None = None,
    ) -> None:
        """`tool_parser`: takes tool calls out of the text; stop strings are looked for before that."""
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids
        self._tool_parser = tool_parser
        self._parts: list[str] = []
        self.num_tokens = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def has_calls(self) -> bool:
        """There are tool calls, and none was broken off."""
        return self._tool_parser is not None and self._tool_parser.has_calls

    @property
    def _is_stopped(self) -> bool:
        return self._matcher.is_stopped or (self._tool_parser is not None and self._tool_parser.is_finished)

    def push(self, token_ids: list[int], *, is_last: bool) -> TextDelta:
        """Add the tokens of one step and return the text that is certain.

        Held back: the start of a character, and what may be the start of a stop string or of a tool call. `is_last` ends the output
        and releases all of it; a final token in `stop_token_ids` then counts but gives no text. The result does not depend on how
        the tokens are divided over calls.
        """
        if self._is_stopped:
            return TextDelta("", 0, stopped=True)
        has_stop_token = is_last and bool(token_ids) and token_ids[-1] in self._stop_token_ids
        visible = token_ids[:-1] if has_stop_token else token_ids
        events: list[str | CallEvent] = []
        num_tokens = len(token_ids)
        # One by one, so that the token which completes a stop string is known.
        for num_pushed, token_id in enumerate(visible, start=1):
            events += self._parsed(self._matcher.push(self._detokenizer.push(token_id)))
            if self._is_stopped:
                num_tokens = num_pushed
                break
        if is_last and not self._is_stopped:
            events += self._parsed(self._matcher.push(self._detokenizer.flush()))
            if self._matcher.is_stopped:
                num_tokens = len(visible)
            events += self._parsed(self._matcher.flush())
        if self._tool_parser is not None and (is_last or self._is_stopped):
            events += self._tool_parser.flush()
        return self._add(events, num_tokens)

    def _parsed(self, text: str) -> Sequence[str | CallEvent]:
        return (text,) if self._tool_parser is None else self._tool_parser.push(text)

    def _add(self, events: list[str | CallEvent], num_tokens: int) -> TextDelta:
        text = "".join([event for event in events if isinstance(event, str)])
        self._parts.append(text)
        self.num_tokens += num_tokens
        calls = () if self._tool_parser is None else _merged([event for event in events if not isinstance(event, str)])
        return TextDelta(text, num_tokens, stopped=self._is_stopped, calls=calls)


def _merged(calls: list[CallEvent]) -> list[CallEvent]:
    """One piece of arguments where several follow each other."""
    merged: list[CallEvent] = []
    for _, group in groupby(calls, key=lambda call: (type(call), call.call_idx)):
        first, *others = group
        if isinstance(first, CallArguments):
            first = CallArguments(
                first.call_idx, first.text + "".join([call.text for call in others if isinstance(call, CallArguments)])
            )
        merged.append(first)
    return merged


class TextProcessor:
    """A model's tokenizer and chat template. `encode` and `render_chat` may run in threads."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    @classmethod
    def load(cls, folder: str | Path, *, chat_template: str | None = None, trust_remote_code: bool = False) -> TextProcessor:
        """Read tokenizer and template from a model's folder.

        `chat_template` replaces the model's template: Jinja text, or the path of a file with it. Raises ModelLoadError or
        ConfigError.
        """
        template = None if chat_template is None else read_chat_template(chat_template)
        tokenizer = Tokenizer.load(folder, trust_remote_code=trust_remote_code)
        return cls(tokenizer, ChatTemplate(tokenizer.hf_tokenizer, template))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own BOS or EOS unless `add_special_tokens` is False."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_fill(self, prefix: str, suffix: str) -> list[int]:
        """Token ids of a prompt that asks for the text between two texts. Raises RequestError, also where the model knows none."""
        return encode_fill(self._tokenizer, prefix, suffix)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole list of tokens, e.g. to echo a prompt given as ids."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        return self._tokenizer.strings(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, perhaps a part of a character; special tokens as they are spelt."""
        return self._tokenizer.token_bytes(token_id)

    def added_tokens(self) -> dict[int, str]:
        """Tokens beside those of plain text that texts show, such as markers of thoughts: their ids and spellings."""
        return self._tokenizer.added_tokens()

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer, named as in tokenizer_config.json, with the chat template that is in use."""
        return self._tokenizer.info() | {"chat_template": self._chat_template.source}

    @property
    def chat_template_text(self) -> str:
        """The chat template's source; empty if there is none, all of them if there are several by name."""
        return self._chat_template.text

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat format.

        Messages are OpenAI's, as dicts. `template_kwargs` are further template variables, `tools` among them. Raises
        InvalidParameterError with the template's own message if it refuses the conversation.
        """
        text = self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=template_kwargs or {},
        )
        try:
            # The template has written the BOS, if the model wants one.
            return self._tokenizer.encode(text, add_special_tokens=False)
        except InvalidParameterError as error:
            raise InvalidParameterError(str(error), param="messages") from error

    def new_output(
        self,
        *,
        stop: tuple[str, ...] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        stop_token_ids: frozenset[int] = frozenset(),
        prompt_token_ids: Sequence[int] = (),
        tool_format: ToolFormat | None = None,
        offered_tools: Collection[str] = (),
        is_single_call: bool = False,
        are_calls_held: bool = False,
    ) -> OutputText:
        """Start the text of one choice.

        stop_token_ids: ids that end this output when they come last: the request's own and, unless EOS is ignored, the model's.
        prompt_token_ids: the prompt whose text the output continues, so that a space between the two is kept. Leave it out for a
            chat answer, which is a text of its own.
        tool_format: of the tool calls to be taken out of the text. Where its marker is a special token, no token is skipped,
            as it must be seen.
        offered_tools: names of the functions that the model was told of. is_single_call: the output ends with its first call.
            are_calls_held: a grammar of text with calls holds them to schemas.
        """
        if tool_format is not None and skip_special_tokens:
            skip_special_tokens = tool_format.marker in self.decode(self.encode(tool_format.marker, add_special_tokens=False))
        decode = partial(self._tokenizer.decode, skip_special_tokens=skip_special_tokens)
        detokenizer = Detokenizer(
            decode,
            byte_values=self._tokenizer.byte_values,
            piece_texts=self._tokenizer.piece_texts(skip_special_tokens=skip_special_tokens),
            prompt_token_ids=prompt_token_ids,
        )
        matcher = StopMatcher(stop, is_included=include_stop_str_in_output)
        parser = None
        if tool_format is not None:
            parser = tool_format.new_parser(offered=offered_tools, is_single=is_single_call, is_held=are_calls_held)
        return OutputText(detokenizer, matcher, stop_token_ids, parser)
