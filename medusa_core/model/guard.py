"""Which models can be served correctly; the rest is refused with the reason.

Our attention enters through transformers' attention interface and sees tokens by position. That excludes layers that keep another
kind of state, layers whose masking does not reach the interface, and rotary frequencies that depend on the longest sequence of a
batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from medusa_core.errors import UnsupportedModelError

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Config attributes of state-space and other recurrent layers, for models whose configs do not list layer types.
_RECURRENT_ATTRIBUTES = (
    "ssm_cfg",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_n_heads",
    "state_size",
    "attn_layer_period",
    "rwkv_version",
)


def check_config(config: PretrainedConfig) -> None:
    """Refuse what the config alone gives away, before weights are loaded. Raises UnsupportedModelError."""
    if reason := next(_config_reasons(config), None):
        raise UnsupportedModelError(f"{config.model_type} models like this one cannot be served: {reason}.")


def check_model(model: PreTrainedModel) -> None:
    """Refuse models whose attention does not go through transformers' attention interface. Raises UnsupportedModelError."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} cannot be served: its attention does not go through transformers' attention interface."
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{name} cannot be served: it keeps recurrent state, which a token tree would corrupt.")
    if not model.base_model_prefix or not hasattr(model, model.base_model_prefix):
        raise UnsupportedModelError(f"{name} cannot be served: its trunk cannot be run apart from its lm_head.")


def _config_reasons(config: PretrainedConfig) -> Iterator[str]:
    text_config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder"
    if getattr(text_config, "is_causal", True) is False or getattr(text_config, "use_bidirectional_attention", None):
        yield "its attention is not causal"
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    if other := sorted(map(str, layer_types - _SERVED_LAYER_TYPES)):
        yield f"it has layers of type {', '.join(other)}, and only full and sliding attention are supported"
    # Llama 4 masks chunks outside of the attention interface.
    if not layer_types and getattr(text_config, "attention_chunk_size", None):
        yield "its attention is chunked"
    if recurrent := [name for name in _RECURRENT_ATTRIBUTES if getattr(text_config, name, None) is not None]:
        yield f"it has recurrent layers ({recurrent[0]} in its config)"
    if (getattr(text_config, "num_kv_shared_layers", 0) or 0) > 0:
        yield "some of its layers share the keys and values of others"
    if any("dynamic" in str(rope.get("rope_type", "")) for rope in rope_parameters(text_config)):
        yield 'its rope type is "dynamic", which depends on the longest sequence in the batch'


def rope_parameters(text_config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """Every set of rope parameters of a config: one, or one per layer type. The dictionaries are the config's own."""
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        yield from (value for value in parameters.values() if isinstance(value, dict))
    elif parameters:
        yield parameters
