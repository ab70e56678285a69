"""Tiny models and tokenizers on disk, as transformers folders and as llama.cpp's converter would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
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


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """A GGUF file of a tiny model and tokenizer: see `_write_gguf`."""
    return _write_gguf


BLOCK_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GEMMA2_BLOCK_NAMES = BLOCK_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ARCHITECTURES = {"gemma3_text": "gemma3"}


def _write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Matrices in `quantization`, vectors in float32. metadata: keys beyond the usual ones; None removes one."""
    model_type = model.config.model_type
    architecture = architecture or ARCHITECTURES.get(model_type, model_type)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_usual_metadata(model) | dict(metadata or {})).items():
        if value is not None:
            writer.add_key_value(f"{architecture}.{key}", value, _value_type(value))
    _add_tokenizer(writer, tokenizer, model.config.vocab_size, architecture)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = _as_llama_cpp_stores_it(name, tensor.numpy(), model)
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name, model_type), values)
        else:
            writer.add_tensor(_gguf_name(name, model_type), gguf.quantize(values, quantization), raw_dtype=quantization)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _usual_metadata(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": 10_000.0,
    }


def _value_type(value: Any) -> gguf.GGUFValueType:
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    return kinds[type(value)]


def _gguf_name(name: str, model_type: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    index, _, leaf = stem.removeprefix("model.layers.").partition(".")
    names = GEMMA2_BLOCK_NAMES if model_type in ("gemma2", "gemma3_text") else BLOCK_NAMES
    return f"blk.{index}.{names[leaf]}.{kind}"


def _as_llama_cpp_stores_it(name: str, values: np.ndarray, model: PreTrainedModel) -> np.ndarray:
    if model.config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if model.config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
        num_heads = model.config.num_attention_heads if ".q_proj." in name else model.config.num_key_value_heads
        halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int, architecture: str) -> None:
    """The byte-level tokenizer as it is, or for families that come with sentencepiece, one of the same special tokens."""
    kinds = gguf.TokenType
    if architecture in ("gemma", "gemma2", "gemma3", "phi3"):
        special = ["<pad>", "<s>", "<|endoftext|>", "<|im_end|>", "<unk>"]
        pieces = ["▁hello", "hello", "hell", "he", "ll", "▁▁", "▁", "h", "e", "l", "o", ","]
        tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
        types = [kinds.CONTROL] * 4 + [kinds.UNKNOWN] + [kinds.BYTE] * 256 + [kinds.NORMAL] * len(pieces)
        writer.add_tokenizer_model("llama")
        writer.add_unk_token_id(4)
        writer.add_token_scores([-float(i) for i in range(vocab_size)])
    else:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        types = [kinds.CONTROL] * 4 + [kinds.NORMAL] * (len(tokens) - 4)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_tokenizer_pre("default")
    num_unused = vocab_size - len(tokens)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(num_unused)])
    writer.add_token_types(types + [kinds.UNUSED] * num_unused)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
