"""Which architectures pass and which are refused, and that the reason is named."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from medusa_core.errors import UnsupportedModelError
from medusa_core.model.guard import check_config, check_model

SERVED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt_neox",
    "gpt_oss",
    "gpt2",
    "opt",
]


@pytest.mark.parametrize("model_type", SERVED)
def test_architectures_that_are_served_pass(make_model, model_type) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "gpt_oss" else {}
    model = make_model(model_type, **experts)
    check_config(model.config)
    check_model(model)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("t5", {}, "encoder-decoder"),
        ("mamba", {}, "linear_attention|recurrent"),
        ("jamba", {}, "mamba|linear_attention|recurrent"),
        ("qwen3_next", {}, "linear_attention"),
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
        ("llama4_text", {}, "chunked"),
        ("gemma3n_text", {"num_kv_shared_layers": 2}, "share the keys"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_configs_that_cannot_be_served_are_refused_with_the_reason(model_type, overrides, reason) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_config(AutoConfig.for_model(model_type, **overrides))


@pytest.mark.parametrize("model_type", ["bloom", "falcon"])
def test_models_outside_the_attention_interface_are_refused(make_model, model_type) -> None:
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        check_model(make_model(model_type))
