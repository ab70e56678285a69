"""Token ids to text, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

# What decoders show for bytes that are not UTF-8.
_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so an unfinished one spans at most 3 tokens; one more keeps its first byte inside the window.
_MAX_CHARACTER_TOKENS = 4
# Tokens held back beyond this are a run of invalid bytes; the window is then cut, so that a token's cost stays constant.
_MAX_PENDING_TOKENS = 8


class Detokenizer:
    """Turns one output's tokens into text deltas whose concatenation is what the tokenizer decodes from all tokens.

    A token's text depends on its neighbours: a leading space is dropped at the very start, pieces join without a space, several
    tokens may share one character. So each token is decoded behind a window of the tokens before it, and what the window itself
    gives is cut off::

        tokens   a  b  c  d  e  f            context: tokens whose text has been returned
                       |--| |-----|          pending: tokens whose text has not been returned in full
                    context  pending         the next delta is decode(context + pending) from character `num_shown` on

    A U+FFFD at the end may be the first bytes of a character, and is held back until the next token decides.

    Byte-fallback tokens (see Tokenizer.byte_values) are decoded here, a character at a time. Decoders look at whole runs of
    them and replace *every* byte of a run that holds an invalid one; a stream cannot take back characters it has sent, so those
    before the first invalid byte stay.

    `piece_texts`, for tokenizers that have them, spare most tokens all this: between two characters a token's text is known.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        byte_values: Mapping[int, int] | None = None,
        piece_texts: Mapping[int, str | None] | None = None,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        """`byte_values`, `piece_texts`: the tokenizer's. `prompt_token_ids`: tokens that the output continues; none if the output
        is a text of its own."""
        self._decode = decode
        self._piece_texts = piece_texts
        self._byte_values = byte_values or {}
        self._byte_run: list[int] = []
        self._context: list[int] = []
        self._pending: list[int] = []
        self._num_shown = 0
        self._set_context(self._end_of(prompt_token_ids))
        if not self._byte_values and self._decode(self._context).endswith(_REPLACEMENT):
            # The prompt ends inside a character, which the output completes.
            self._num_shown -= 1
            self._is_inside_character = True

    def _end_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, as many as it takes to hold some of its text."""
        num_tokens = _MAX_PENDING_TOKENS
        while num_tokens < len(prompt_token_ids) and not self._decode(prompt_token_ids[-num_tokens:]):
            num_tokens *= 2
        return list(prompt_token_ids[-num_tokens:])

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; often empty or more than the token's own."""
        if self._piece_texts is not None and not self._pending and not self._is_inside_character:
            text = self._piece_texts[token_id]
            if text is not None:
                if text:
                    self._context, self._num_shown = [token_id], len(text)
                return text
        if token_id in self._byte_values:
            return self._push_byte(token_id)
        return self._end_byte_run() + self._push_piece(token_id)

    def flush(self) -> str:
        """The text held back, at the end of the output. Bytes that never became a character show as U+FFFD."""
        return self._release_pending() + self._end_byte_run()

    def _push_piece(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT):
            return self._hold_back(text)
        return self._release(text)

    def _hold_back(self, text: str) -> str:
        """Return all but the last character. The earlier ones, U+FFFD too, are certain: only the last can still change."""
        self._drop_textless()
        delta = text[self._num_shown : -1]
        self._num_shown += len(delta)
        if len(self._pending) > _MAX_PENDING_TOKENS:
            window = self._pending[-_MAX_CHARACTER_TOKENS:]
            self._context, self._pending = window[:-1], window[-1:]
            self._num_shown = len(self._decode(window)) - 1
        return delta

    def _release(self, text: str) -> str:
        delta = text[self._num_shown :]
        if delta:
            self._set_context(self._pending)
        else:
            self._drop_textless()
        return delta

    def _drop_textless(self) -> None:
        """Forget the newest token if it never has text (a skipped special token, say): it would only fill the window."""
        # Twice, because a decoder that drops the leading space shows nothing for a single token that is just a space.
        if not self._decode(self._pending[-1:] * 2):
            self._pending.pop()

    def _release_pending(self) -> str:
        return self._release(self._decode(self._context + self._pending)) if self._pending else ""

    def _push_byte(self, token_id: int) -> str:
        delta = self._release_pending()
        self._byte_run.append(token_id)
        character = self._character(self._byte_run)
        if character:
            self._set_context(self._byte_run)
            self._byte_run = []
        return delta + character

    def _character(self, byte_run: list[int]) -> str:
        if len(byte_run) > _MAX_CHARACTER_TOKENS:
            return ""
        try:
            return bytes(self._byte_values[i] for i in byte_run).decode()
        except UnicodeDecodeError:
            return ""

    def _end_byte_run(self) -> str:
        if not self._byte_run:
            return ""
        delta = _REPLACEMENT * len(self._byte_run)
        self._set_context(self._byte_run[-_MAX_CHARACTER_TOKENS:])
        self._byte_run = []
        return delta

    def _set_context(self, token_ids: list[int]) -> None:
        self._context = token_ids
        self._pending = []
        self._num_shown = len(self._decode(token_ids))
        self._is_inside_character = False
