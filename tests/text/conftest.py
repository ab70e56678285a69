"""Tiny tokenizers of the kinds that models use, built here: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from medusa_core.text import tokenizer as text_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind",
    "def main(argument): return argument + 1  # naïve café",
    "你好，世界 😀 emoji 👩‍👩‍👧 done",
]
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|user|>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _trained_pieces(special: list[str]) -> Tokenizer:
    """BPE over words that begin with U+2581, as SentencePiece writes them; rare characters have no piece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=bool(special), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=["<unk>", *special], show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    tokenizer = _trained_pieces([f"<0x{value:02X}>" for value in range(256)])
    # Training needs the byte pieces as special tokens; a real vocabulary has them as ordinary pieces.
    state = tokenizer.to_str()
    bare = Tokenizer.from_str(state.replace('"special": true', '"special": false').replace('"special":true', '"special":false'))
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bare


def _metaspace() -> Tokenizer:
    tokenizer = _trained_pieces([])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_suffix() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "byte_fallback": _byte_fallback,
    "metaspace": _metaspace,
    "word_piece": _word_piece,
    "word_suffix": _word_suffix,
}


def _finish(kind: str) -> PreTrainedTokenizerFast:
    backend = BUILDERS[kind]()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, text_tokenizer.Tokenizer]:
    return {kind: text_tokenizer.Tokenizer(_finish(kind)) for kind in BUILDERS}


@pytest.fixture(scope="session", params=list(BUILDERS))
def any_tokenizer(request, tokenizers_by_kind) -> text_tokenizer.Tokenizer:
    return tokenizers_by_kind[request.param]


@pytest.fixture(scope="session")
def byte_level(tokenizers_by_kind) -> text_tokenizer.Tokenizer:
    return tokenizers_by_kind["byte_level"]


@pytest.fixture(scope="session")
def byte_fallback(tokenizers_by_kind) -> text_tokenizer.Tokenizer:
    return tokenizers_by_kind["byte_fallback"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A model's folder as the loader leaves it: tokenizer files with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    hf_tokenizer = _finish("byte_level")
    hf_tokenizer.chat_template = TEMPLATE
    hf_tokenizer.save_pretrained(folder)
    return folder
