"""Loading a base model: what is checked, what is refused, what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from medusa_core.config import ModelConfig
from medusa_core.errors import ConfigError, ModelLoadError, UnsupportedModelError
from medusa_core.model.loader import load_model
from medusa_core.model.projection import Projection, build_projection, check_projection


def test_a_folder_loads_ready_to_run(model_folder, load) -> None:
    loaded = load(model_folder())
    assert loaded.name == "llama"
    assert (loaded.vocab_size, loaded.hidden_size, loaded.max_model_len) == (320, 32, 128)
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_in_the_dtype_asked_for(model_folder, load, dtype) -> None:
    loaded = load(model_folder(), dtype=dtype)
    assert loaded.model.dtype == loaded.dtype == getattr(torch, dtype)


def test_eos_ids_are_the_union_of_both_configs(model_folder, load) -> None:
    folder = model_folder()
    GenerationConfig(eos_token_id=[7, 5]).save_pretrained(folder)
    assert load(folder).eos_token_ids == (2, 5, 7)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("phi", {}),  # an lm_head with a bias
        ("gpt_neox", {}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_projection_gives_the_models_own_logits(make_model, model_type, overrides) -> None:
    model = make_model(model_type, **overrides)
    ids = torch.arange(20)[None]
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(build_projection(model)(hidden), model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_projection_of_some_tokens_is_the_same_columns(make_model) -> None:
    model = make_model("gemma2", final_logit_softcapping=3.0, head_dim=8)
    projection, hidden = build_projection(model), torch.randn(3, 32)
    ids = torch.tensor([7, 0, 300])
    torch.testing.assert_close(projection.restricted_to(ids)(hidden), projection(hidden)[:, ids])


def test_logits_that_are_changed_in_an_unknown_way_are_refused(make_model) -> None:
    model = make_model("llama")
    check_projection(model, Projection(model.lm_head))
    with pytest.raises(UnsupportedModelError, match="changes its logits"):
        check_projection(model, Projection(model.lm_head, multiplier=0.5))


def test_max_model_len_may_be_lowered_but_not_raised(model_folder, load) -> None:
    folder = model_folder()
    assert load(folder, max_model_len=64).max_model_len == 64
    with pytest.raises(ConfigError, match="at most 128"):
        load(folder, max_model_len=129)


def test_missing_weights_are_an_error_not_random_numbers(model_folder, load) -> None:
    folder = model_folder(num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"missing_keys model\.layers\.1"):
        load(folder)


def test_truncated_weights_are_an_error(model_folder, load) -> None:
    folder = model_folder()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no config.json"), ("{", "cannot be read"), ('{"model_type": "no_such_model"}', "cannot be read")],
)
def test_folders_without_a_readable_config_are_an_error(tmp_path: Path, content, message) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        load_model(ModelConfig(model=str(tmp_path), device="cpu"), progress=False)


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"neither a model folder nor a \.gguf file"):
        load_model(ModelConfig(model=str(path), device="cpu"), progress=False)


def _longrope() -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 16,
    }


@pytest.mark.parametrize("max_model_len", [16, 64])
def test_longrope_answers_do_not_depend_on_the_length_of_neighbours(model_folder, load, max_model_len) -> None:
    folder = model_folder("phi3", rope_parameters=_longrope(), original_max_position_embeddings=16)
    trunk = load(folder, max_model_len=max_model_len).base_model
    ids = torch.arange(5, 13)
    alone = trunk(input_ids=ids[None], position_ids=torch.arange(8)[None]).last_hidden_state[0]
    batch_ids, positions = torch.stack([ids, ids]), torch.stack([torch.arange(8), torch.arange(40, 48)])
    beside_long = trunk(input_ids=batch_ids, position_ids=positions).last_hidden_state[0]
    torch.testing.assert_close(beside_long, alone, atol=1e-5, rtol=1e-5)
