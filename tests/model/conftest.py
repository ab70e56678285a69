"""Tiny models and tokenizers on disk, and heads for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from medusa_core.config import ModelConfig
from medusa_core.model.loader import LoadedModel, load_model

VOCAB_SIZE = 320
HIDDEN_SIZE = 32
# Widths are multiples of 32, the block length of GGUF's Q8_0.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """A tiny random float32 model; weights are wide enough for logits to differ clearly."""

    def make(model_type: str, **overrides: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**TINY, **overrides})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
        return model

    return make


@pytest.fixture
def model_folder(make_model, tmp_path: Path) -> Callable[..., Path]:
    """A tiny model saved as transformers saves it, by model type."""

    def save(model_type: str = "llama", **overrides: Any) -> Path:
        folder = tmp_path / model_type
        make_model(model_type, **overrides).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def load() -> Callable[..., LoadedModel]:
    def load_folder(folder: Path, **options: Any) -> LoadedModel:
        return load_model(ModelConfig(**{"model": str(folder), "dtype": "float32", "device": "cpu", **options}), progress=False)

    return load_folder


@pytest.fixture
def loaded(model_folder, load) -> LoadedModel:
    """A tiny Llama, loaded."""
    return load(model_folder())


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 256 bytes, a few merges and special tokens 0..3."""
    special = ["<pad>", "<s>", "<|endoftext|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    pieces = special + alphabet + [a + b for a, b in merges]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<pad>")
