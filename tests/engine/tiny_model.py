"""A tiny random Llama in a folder, with a tokenizer that knows bytes, and heads for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 320
HIDDEN_SIZE = 32
EOS_ID = 2
NUM_HEADS = 2


def save_tiny_model(folder: Path, *, max_position_embeddings: int = 128) -> Path:
    """Weights wide enough that rounding decides nothing in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def heads_tensors(hidden_size: int) -> dict[str, Tensor]:
    """Random heads in the published layout with an lm_head each."""
    torch.manual_seed(1)
    tensors = {}
    for head in range(NUM_HEADS):
        tensors[f"{head}.0.linear.weight"] = torch.randn(hidden_size, hidden_size) * 0.1
        tensors[f"{head}.0.linear.bias"] = torch.zeros(hidden_size)
        tensors[f"{head}.1.weight"] = torch.randn(VOCAB_SIZE, hidden_size)
    return tensors


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: token_id for token_id, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
