"""Grammars in tests: a vocabulary as small as the tiny models', and compilers."""

from __future__ import annotations

from pathlib import Path

from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_core.grammar.compiler import GrammarCompiler, vocabulary
from medusa_core.grammar.lanes import GrammarLanes

VOCAB_SIZE = 97
EOS_ID = 3
_SPECIAL = ["<pad>", "<s>", "<unk>", "</s>"]
# In the byte-level alphabet, where a space is written as Ġ and a line feed as Ċ. Several ways to write the same text.
_LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", *"ABCDEF", *'{}[]":,.-_+/', "Ġ", "Ċ", "\\"]
_LONGER = [
    "ab",
    "abc",
    "cat",
    "dog",
    "bird",
    "12",
    "123",
    "20",
    '{"',
    '":',
    '",',
    '"}',
    '":"',
    "}}",
    "],",
    '["',
    'Ġ"',
    "ĊĠĠ",
    "true",
]
_LONGER += ["false", "null", "name", "age", "aa", "aaa", "ĠĠ", "er", "in", "na", "me", "do", "at", "og", "bi", "rd"]
PIECES = [*_SPECIAL, *_LETTERS, *_LONGER]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Fewer tokens than the tiny models have logits, as it is with many models."""
    assert len(set(PIECES)) == len(PIECES) <= VOCAB_SIZE
    backend = Tokenizer(models.BPE({piece: token_id for token_id, piece in enumerate(PIECES)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_tiny_tokenizer(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_compiler() -> GrammarCompiler:
    return GrammarCompiler(lambda: vocabulary(tiny_tokenizer(), VOCAB_SIZE, [EOS_ID]))


def no_compiler() -> GrammarCompiler:
    """Of an engine whose tokenizer is of no use."""

    def load() -> LLTokenizer:
        raise ValueError("there is none")

    return GrammarCompiler(load)


def no_grammars() -> GrammarLanes:
    return GrammarLanes(no_compiler(), num_tokens=VOCAB_SIZE, eos_token_ids=())
