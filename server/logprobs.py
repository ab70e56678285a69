"""Log-probabilities as the two endpoints word them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medusa_core.outputs import TokenLogprob
from server.protocol.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from server.protocol.completions import CompletionLogprobs

# What the API says for tokens that cannot be; JSON has no infinity.
_LOWEST = -9999.0

TokenBytes = Callable[[int], bytes]


def chat_logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> ChatLogprobs:
    """Of tokens of a message."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        token = _top_logprob(token_id, entry.logprob, token_bytes)
        tops = [_top_logprob(*top, token_bytes) for top in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        content.append(ChatTokenLogprob(token.token, token.logprob, token.bytes, tops))
    return ChatLogprobs(content)


class CompletionLogprobWriter:
    """Of one choice's tokens, in order, the echoed prompt's included.

    is_hidden: whether a token gives no text (special tokens, unless they are asked for), so that offsets do not count it.
    """

    def __init__(self, token_bytes: TokenBytes, is_hidden: Callable[[int], bool]) -> None:
        self._token_bytes = token_bytes
        self._is_hidden = is_hidden
        self._num_characters = 0

    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], *, text: str) -> CompletionLogprobs:
        """The next tokens; None for the first token of a prompt. text: theirs, in which a client's own prompt may spell tokens that
        are hidden elsewhere."""
        out = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            name = self._name(token_id)
            out.text_offset.append(self._advance(token_id, is_hidden=name not in text and self._is_hidden(token_id)))
            out.tokens.append(name)
            out.token_logprobs.append(None if entry is None else _finite(entry.logprob))
            out.top_logprobs.append(None if entry is None else self._top(token_id, entry))
        return out

    def _advance(self, token_id: int, *, is_hidden: bool) -> int:
        """Where the token starts: a token that goes on with a character starts where that does."""
        data = b"" if is_hidden else self._token_bytes(token_id)
        starts = [byte & 0xC0 != 0x80 for byte in data]
        offset = self._num_characters - int(bool(starts) and not starts[0])
        self._num_characters += sum(starts)
        return max(offset, 0)

    def _top(self, token_id: int, entry: TokenLogprob) -> dict[str, float]:
        top = {self._name(top_id): _finite(value) for top_id, value in zip(entry.top_ids, entry.top_logprobs, strict=True)}
        top.setdefault(self._name(token_id), _finite(entry.logprob))
        return top

    def _name(self, token_id: int) -> str:
        """Parts of characters as the API spells them, so that no two of them share a key."""
        data = self._token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top_logprob(token_id: int, logprob: float, token_bytes: TokenBytes) -> TopLogprob:
    data = token_bytes(token_id)
    return TopLogprob(data.decode(errors="replace"), _finite(logprob), list(data))


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
