"""How llama.cpp writes each model family into GGUF, undone: tensor names and values, and the config behind the metadata.

The families differ in three ways: names of the norms, whether tensors are transformed (`llama` permutes the rows of q and k for
its own rotary layout, `gemma` stores norm weights plus one), and which hyper-parameters the metadata leaves out.
"""

# Shape suffixes: H heads · D head dim

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_core.errors import ModelLoadError, UnsupportedModelError

Array = npt.NDArray[np.float32]

_COMMON_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA2_BLOCK_NAMES = _COMMON_BLOCK_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_BLOCK_NAMES = _COMMON_BLOCK_NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# Rotary factors are metadata that llama.cpp stores as tensors.
ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


class GgufMetadata:
    """Metadata of one file: `general.*` and `tokenizer.*` by full key, the architecture's own keys without their prefix.

    rope_tensors: the tensors of ROPE_TENSORS that the file holds. tensor_names: all of them.
    """

    def __init__(self, fields: Mapping[str, Any], rope_tensors: Mapping[str, Array], tensor_names: frozenset[str]) -> None:
        self._fields = fields
        self.rope_tensors = rope_tensors
        self.tensor_names = tensor_names
        self.architecture = str(fields.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's prefix."""
        return self._fields.get(f"{self.architecture}.{key}", default)

    def require(self, key: str) -> Any:
        """As `get`; raises ModelLoadError when the key is missing."""
        if (value := self.get(key)) is None:
            raise ModelLoadError(
                f"The GGUF file lacks the metadata key {self.architecture}.{key}.", hint="Convert the model again."
            )
        return value

    def field(self, key: str, default: Any = None) -> Any:
        """A value by its full key."""
        return self._fields.get(key, default)


@dataclass(frozen=True)
class Family:
    """One GGUF architecture.

    config: metadata to arguments of the transformers config, beyond those all families share.
    has_permuted_qk, has_shifted_norms: what to undo, see the module's docstring.
    """

    model_type: str
    config: Callable[[GgufMetadata], dict[str, Any]]
    block_names: Mapping[str, str] = field(default_factory=lambda: _COMMON_BLOCK_NAMES)
    has_permuted_qk: bool = False
    has_shifted_norms: bool = False

    def tensor_name(self, gguf_name: str) -> str | None:
        """The transformers name of a tensor; None if this family has no such tensor."""
        stem, _, kind = gguf_name.rpartition(".")
        if stem in _TOP_NAMES:
            return f"{_TOP_NAMES[stem]}.{kind}"
        prefix, _, block_stem = stem.partition(".")
        index, _, leaf = block_stem.partition(".")
        if prefix != "blk" or not index.isdigit() or leaf not in self.block_names:
            return None
        return f"model.layers.{index}.{self.block_names[leaf]}.{kind}"

    def restore(self, gguf_name: str, values: Array, metadata: GgufMetadata) -> Array:
        """The tensor's values as transformers wants them."""
        if self.has_shifted_norms and gguf_name.endswith("norm.weight"):
            return values - np.float32(1.0)
        if self.has_permuted_qk and ".attn_q." in gguf_name:
            return _unpermute(values, int(metadata.require("attention.head_count")))
        if self.has_permuted_qk and ".attn_k." in gguf_name:
            return _unpermute(values, _num_kv_heads(metadata))
        return values


def build_config(metadata: GgufMetadata, vocab_size: int) -> dict[str, Any]:
    """Arguments of the transformers config of `metadata`'s family, `model_type` included."""
    family = family_of(metadata)
    num_heads = int(metadata.require("attention.head_count"))
    hidden_size = int(metadata.require("embedding_length"))
    return {
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": int(metadata.require("feed_forward_length")),
        "num_hidden_layers": int(metadata.require("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _num_kv_heads(metadata),
        "head_dim": int(metadata.get("attention.key_length", hidden_size // num_heads)),
        "rms_norm_eps": float(metadata.require("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": int(metadata.require("context_length")),
        "tie_word_embeddings": "output.weight" not in metadata.tensor_names,
        "bos_token_id": metadata.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.field("tokenizer.ggml.padding_token_id"),
        **family.config(metadata),
    }


def family_of(metadata: GgufMetadata) -> Family:
    """The family of a file; raises UnsupportedModelError naming its architecture and the supported ones."""
    name = metadata.architecture
    if name not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"GGUF files of architecture {name!r} are not supported (supported: {supported}).",
            hint="Serve the model's safetensors version instead.",
        )
    if int(metadata.get("expert_count", 0)) > 0:
        raise UnsupportedModelError(
            f"GGUF files of architecture {name!r} with experts are not supported.", hint="Serve the safetensors version instead."
        )
    return FAMILIES[name]


def _num_kv_heads(metadata: GgufMetadata) -> int:
    count = metadata.get("attention.head_count_kv", metadata.require("attention.head_count"))
    if isinstance(count, list):
        raise UnsupportedModelError(
            f"GGUF files of architecture {metadata.architecture!r} with different layers are not supported."
        )
    return int(count)


def _unpermute(values: Array, num_heads: int) -> Array:
    """Rows [H, D/2, 2] (pairs interleaved) back to [H, 2, D/2] (halves), for weights and biases."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _rope(metadata: GgufMetadata) -> dict[str, Any]:
    """`rope_parameters` of plain, linear, yarn and (from the `rope_freqs` tensor) llama3 scaling."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base", 10_000.0))}
    scaling = metadata.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in metadata.rope_tensors:
        return rope | _llama3_rope(metadata.rope_tensors["rope_freqs.weight"], rope["rope_theta"])
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise UnsupportedModelError(f"The GGUF file's rope scaling {scaling!r} is not supported.")
    rope |= {"rope_type": scaling, "factor": float(metadata.require("rope.scaling.factor"))}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = int(metadata.require("rope.scaling.original_context_length"))
    return rope


def _llama3_rope(factors: Array, theta: float) -> dict[str, Any]:
    """The llama3 scaling behind per-frequency divisors [D/2].

    The divisors depend on three constants that all Llama 3.x models share (low 1, high 4, original length 8192) and on the factor,
    which is the largest divisor. They are computed back to make sure.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors), dtype=np.float64) / len(factors))
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-2):
        raise UnsupportedModelError(
            "The GGUF file's rope_freqs tensor is not Llama 3's scaling.", hint="Serve the safetensors version."
        )
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _llama(metadata: GgufMetadata) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(metadata),
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensor_names,
    }


def _qwen(metadata: GgufMetadata) -> dict[str, Any]:
    return {"rope_parameters": _rope(metadata)}


def _gemma(metadata: GgufMetadata) -> dict[str, Any]:
    return {"rope_parameters": _rope(metadata), "hidden_activation": "gelu_pytorch_tanh"}


def _query_pre_attn_scalar(metadata: GgufMetadata, num_layers_27b: int) -> dict[str, Any]:
    """The metadata leaves out the attention scale; the 27B models alone use hidden size / heads instead of the head dimension."""
    is_27b = int(metadata.require("block_count")) == num_layers_27b
    per_head = int(metadata.require("embedding_length")) // int(metadata.require("attention.head_count"))
    return {"query_pre_attn_scalar": per_head if is_27b else int(metadata.get("attention.key_length", per_head))}


def _gemma2(metadata: GgufMetadata) -> dict[str, Any]:
    return {
        **_gemma(metadata),
        **_query_pre_attn_scalar(metadata, num_layers_27b=46),
        "sliding_window": int(metadata.require("attention.sliding_window")),
        "attn_logit_softcapping": float(metadata.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(metadata.get("final_logit_softcapping", 30.0)),
    }


def _gemma3(metadata: GgufMetadata) -> dict[str, Any]:
    # Sliding layers keep the frequencies of the first Gemma; the base in the metadata is that of the full layers.
    sliding = {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        **_query_pre_attn_scalar(metadata, num_layers_27b=62),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": int(metadata.require("attention.sliding_window")),
        "rope_parameters": {"full_attention": _rope(metadata), "sliding_attention": sliding},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
    }


def _phi3(metadata: GgufMetadata) -> dict[str, Any]:
    head_dim = int(metadata.require("embedding_length")) // int(metadata.require("attention.head_count"))
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(metadata.get("rope.freq_base", 10_000.0)),
        "partial_rotary_factor": int(metadata.get("rope.dimension_count", head_dim)) / head_dim,
    }
    original = int(metadata.get("rope.scaling.original_context_length", metadata.require("context_length")))
    if "rope_factors_long.weight" in metadata.rope_tensors:
        rope |= {
            "rope_type": "longrope",
            "long_factor": metadata.rope_tensors["rope_factors_long.weight"].tolist(),
            "short_factor": metadata.rope_tensors["rope_factors_short.weight"].tolist(),
            "original_max_position_embeddings": original,
        }
    config: dict[str, Any] = {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": metadata.get("attention.sliding_window") or None,
    }
    if metadata.field("tokenizer.ggml.padding_token_id") is None:
        # The class's default is an id that smaller vocabularies do not have.
        config["pad_token_id"] = metadata.field("tokenizer.ggml.eos_token_id")
    return config


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _llama, has_permuted_qk=True),
    "qwen2": Family("qwen2", _qwen),
    "qwen3": Family("qwen3", _qwen),
    "gemma": Family("gemma", _gemma, has_shifted_norms=True),
    "gemma2": Family("gemma2", _gemma2, _GEMMA2_BLOCK_NAMES, has_shifted_norms=True),
    "gemma3": Family("gemma3_text", _gemma3, _GEMMA2_BLOCK_NAMES, has_shifted_norms=True),
    "phi3": Family("phi3", _phi3, _PHI3_BLOCK_NAMES),
}
