"""A model's tokenizer, reduced to what serving needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from medusa_core.errors import InvalidParameterError, ModelLoadError


def import_tokenizers() -> None:
    """Import what `Tokenizer.load` needs. That takes seconds, so a caller that waits for something else may do it meanwhile."""
    from transformers import AutoTokenizer  # noqa: F401 - the import is all


class PieceTexts(dict[int, str | None]):
    """The text of each token wherever it stands; None if that is not known: the token holds a part of a character.

    Filled as tokens are looked up, so that each is decoded once.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, token_id: int) -> str | None:
        text = self._decode([token_id])
        piece = self[token_id] = None if "\ufffd" in text else text
        return piece


class Tokenizer:
    """Wraps a transformers tokenizer.

    `encode` and `decode` change no state, so several threads may use them at once.

    byte_values: for tokenizers with byte fallback (pieces `<0x00>` to `<0xFF>`), the byte each such id stands for; else empty.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.byte_values: Mapping[int, int] = _byte_fallback_values(hf_tokenizer)
        self._piece_texts: dict[bool, PieceTexts] = {}
        if _is_byte_level(hf_tokenizer):
            self._piece_texts = {skip: PieceTexts(partial(self.decode, skip_special_tokens=skip)) for skip in (True, False)}
        # A tokenizer.json may carry truncation or padding; the first call switches both off, which changes the shared tokenizer.
        # Doing it here leaves nothing to change for calls that run in parallel.
        hf_tokenizer.encode("")

    @classmethod
    def load(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Read the tokenizer saved in a folder. Raises ModelLoadError."""
        # transformers imports torch here; a caller that only looks at this package should not pay for that.
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise ModelLoadError(f"The tokenizer folder {folder} does not exist.")
        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
        # A malformed tokenizer.json raises KeyError, TypeError or Exception itself, depending on where it is wrong.
        except Exception as error:
            raise ModelLoadError(
                f"No tokenizer could be loaded from {folder}: {error}",
                hint="The folder needs tokenizer.json (or the files of its tokenizer class) and tokenizer_config.json.",
            ) from error
        return cls(hf_tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises InvalidParameterError if the text has no UTF-8 form."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair ("\ud83d"), which is no character and which no tokenizer takes.
            raise InvalidParameterError(
                f"The text is not valid Unicode: character {error.start} is half of a surrogate pair.", param="prompt"
            ) from error
        ids: list[int] = self.hf_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_inner(self, text: str) -> list[int]:
        """Token ids of a text that follows on another: without the space that some tokenizers put in front of every text."""
        begin = self.encode("\n", add_special_tokens=False)
        token_ids = self.encode("\n" + text, add_special_tokens=False)
        # SentencePiece writes spaces as U+2581, and no piece holds a line feed and more.
        has_space = self.strings(begin[:1]) == ["\u2581"] and token_ids[: len(begin)] == begin
        return token_ids[len(begin) :] if has_space else self.encode(text, add_special_tokens=False)

    def bos(self) -> list[int]:
        """The token in front of every text, if the tokenizer writes one."""
        return [token_id for token_id in self.encode("")[:1] if token_id == self.hf_tokenizer.bos_token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""
        token_id: int | None = self.hf_tokenizer.convert_tokens_to_ids(token)
        # Where there is none, this is the unknown token's.
        return token_id if token_id is not None and self.strings([token_id]) == [token] else None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, without the "clean-up" that moves spaces before punctuation: it would change what the model wrote.

        Ids that the tokenizer does not know (a model's vocabulary may be padded) give no text.
        """
        text: str = self.hf_tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def strings(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them; empty for ids that the tokenizer does not know."""
        return [token or "" for token in self.hf_tokenizer.convert_ids_to_tokens(list(token_ids))]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, special tokens as they are spelt; none for ids that the tokenizer does not know.

        They may be a part of a character. A token that starts with a space keeps it, though a text that starts with the token may
        not.
        """
        if token_id in self.byte_values:
            return bytes([self.byte_values[token_id]])
        token = self.hf_tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        added = self.hf_tokenizer.added_tokens_decoder.get(token_id)
        if added is not None:
            return str(added.content).encode()
        if self._piece_texts:
            return bytes(_byte_alphabet()[character] for character in token)
        # The second of two, since a text's first token may lose its space.
        return self.decode([token_id] * 2)[len(self.decode([token_id])) :].encode()

    def added_tokens(self) -> dict[int, str]:
        """Tokens that were added to the vocabulary and are not special: they stand for what they spell, and texts show them."""
        tokens = self.hf_tokenizer.added_tokens_decoder
        return {token_id: str(token.content) for token_id, token in tokens.items() if not token.special}

    def info(self) -> dict[str, Any]:
        """Its class in transformers, and under the names of `tokenizer_config.json` its special tokens and chat template."""
        tokenizer = self.hf_tokenizer
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": None,
            "eos_token": None,
            "pad_token": None,
            "unk_token": None,
            **named,
            "additional_special_tokens": [token for token in tokenizer.all_special_tokens if token not in named.values()],
            "chat_template": tokenizer.chat_template,
        }

    def piece_texts(self, *, skip_special_tokens: bool = True) -> PieceTexts | None:
        """Texts of tokens for tokenizers that give a token the same bytes whatever is around it; None for others."""
        return self._piece_texts.get(skip_special_tokens)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: value for value, character in bytes_to_unicode().items()}


def _is_byte_level(hf_tokenizer: Any) -> bool:
    """True if tokens stand for bytes, as in GPT-2's scheme, and nothing but the library turns them into text."""
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    cls = type(hf_tokenizer)
    return (
        isinstance(hf_tokenizer, PreTrainedTokenizerFast)
        and isinstance(hf_tokenizer.backend_tokenizer.decoder, ByteLevel)
        and (cls.decode, cls._decode) == (PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode)
    )


def _byte_fallback_values(hf_tokenizer: Any) -> dict[int, int]:
    pieces = [f"<0x{value:02X}>" for value in range(256)]
    ids = hf_tokenizer.convert_tokens_to_ids(pieces)
    # A missing piece maps to None or to the unknown token, so ask back. A vocabulary may also hold these strings as plain text.
    known = {i: value for value, i in enumerate(ids) if i is not None and hf_tokenizer.convert_ids_to_tokens(i) == pieces[value]}
    letter_id = next((i for i, value in known.items() if value == ord("A")), None)
    is_fallback = letter_id is not None and hf_tokenizer.decode([letter_id]) == "A"
    return known if is_fallback else {}
