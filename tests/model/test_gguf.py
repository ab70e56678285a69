"""GGUF files against the model they were written from and against transformers' own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.gguf import gguf_tokenizer_mapping

from medusa_core.config import ModelConfig
from medusa_core.errors import ModelLoadError, UnsupportedModelError
from medusa_core.model.gguf import cached_conversion, convert_gguf, source_sha256
from medusa_core.model.loader import load_model

# Head dims of 256 (Gemma) and 128 (Qwen3) are what transformers' reader takes for granted.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8, "num_hidden_layers": 6},
    "phi3": {},
}
METADATA: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"attention.sliding_window": 8},
    "phi3": {"rope.dimension_count": 8},
}
# Its reader knows no GGUF of the first Gemma.
READ_BY_TRANSFORMERS = [name for name in FAMILIES if name != "gemma"]
# Earlier versions of transformers read no tokenizer of the first Gemma, and Phi-3's with a fault in its spaces.
HAS_FULL_TOKENIZER_READER = hasattr(gguf_tokenizer_mapping, "convert_gguf_tokenizer")
F32, Q8_0 = gguf_package.GGMLQuantizationType.F32, gguf_package.GGMLQuantizationType.Q8_0


def _logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits


def _original(make_model, family: str, **overrides: Any) -> PreTrainedModel:
    if family == "gemma" and not HAS_FULL_TOKENIZER_READER:
        pytest.skip("this version of transformers reads no tokenizer of the first Gemma")
    if family == "gemma3_text":
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        overrides["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}
    return make_model(family, **{**FAMILIES[family], **overrides})


def _converted(path: Path, tmp_path: Path) -> PreTrainedModel:
    folder = convert_gguf(path, tmp_path / "out", torch.float32, progress=False)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def _read_by_transformers(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantised_files_give_the_models_own_logits(make_model, tokenizer, write_gguf, tmp_path, family) -> None:
    model = _original(make_model, family)
    path = write_gguf(model, tokenizer, tmp_path / "model.gguf", metadata=METADATA.get(family))
    torch.testing.assert_close(_logits(_converted(path, tmp_path)), _logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantization", [F32, Q8_0], ids=["F32", "Q8_0"])
@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_logits_equal_those_of_transformers_reader(make_model, tokenizer, write_gguf, tmp_path, family, quantization) -> None:
    model = _original(make_model, family)
    path = write_gguf(model, tokenizer, tmp_path / "model.gguf", quantization=quantization, metadata=METADATA.get(family))
    expected = _logits(_read_by_transformers(path))
    torch.testing.assert_close(_logits(_converted(path, tmp_path)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tied_embeddings_are_recognised_by_the_missing_output_tensor(make_model, tokenizer, write_gguf, tmp_path, family) -> None:
    model = _original(make_model, family, tie_word_embeddings=True)
    converted = _converted(write_gguf(model, tokenizer, tmp_path / "model.gguf"), tmp_path)
    assert converted.config.tie_word_embeddings
    torch.testing.assert_close(_logits(converted), _logits(model), atol=1e-4, rtol=1e-4)


def test_llama3_scaling_is_read_from_its_tensor(make_model, tokenizer, write_gguf, tmp_path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = make_model("llama", head_dim=64, rope_parameters=rope)
    plain = 10_000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = write_gguf(model, tokenizer, tmp_path / "model.gguf", extra_tensors={"rope_freqs.weight": factors})
    converted = _converted(path, tmp_path)
    assert converted.config.rope_parameters == pytest.approx(rope)
    other = write_gguf(model, tokenizer, tmp_path / "other.gguf", extra_tensors={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        convert_gguf(other, tmp_path / "other", torch.float32, progress=False)


def test_phi3_long_factors_are_read_from_their_tensors(make_model, tokenizer, write_gguf, tmp_path) -> None:
    short, long = np.array([1.0, 1.5, 2.0, 2.5], np.float32), np.array([4.0, 5.0, 6.0, 7.0], np.float32)
    path = write_gguf(
        _original(make_model, "phi3"), tokenizer, tmp_path / "model.gguf",
        metadata={"rope.scaling.original_context_length": 16, "rope.dimension_count": 8},
        extra_tensors={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
    )  # fmt: skip
    rope = _converted(path, tmp_path).config.rope_parameters
    assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("longrope", 16)
    assert (rope["short_factor"], rope["long_factor"]) == (short.tolist(), long.tolist())


@pytest.mark.parametrize(("scaling", "rope_type"), [("linear", "linear"), ("yarn", "yarn")])
def test_rope_scaling_comes_from_the_metadata(make_model, tokenizer, write_gguf, tmp_path, scaling, rope_type) -> None:
    metadata = {"rope.scaling.type": scaling, "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    path = write_gguf(_original(make_model, "qwen2"), tokenizer, tmp_path / "model.gguf", metadata=metadata)
    rope = _converted(path, tmp_path).config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (rope_type, 4.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_template_and_ends_of_turns_come_along(make_model, tokenizer, write_gguf, tmp_path, family) -> None:
    path = write_gguf(_original(make_model, family), tokenizer, tmp_path / "model.gguf", metadata=METADATA.get(family))
    options = ModelConfig(model=str(path), dtype="float32", device="cpu")
    loaded = load_model(options, progress=False, cache_dir=tmp_path / "cache")
    converted = AutoTokenizer.from_pretrained(loaded.folder)
    ids = converted("hello, hell<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == 3
    if family != "phi3" or HAS_FULL_TOKENIZER_READER:
        assert converted.decode(ids).strip() == "hello, hell<|im_end|>"
    assert (converted.bos_token_id, converted.eos_token_id, converted.pad_token_id) == (1, 2, 0)
    if family in ("llama", "qwen2", "qwen3"):
        assert ids == tokenizer("hello, hell<|im_end|>")["input_ids"]
    assert converted.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert loaded.eos_token_ids == (2, 3)  # <|endoftext|> by its key, <|im_end|> by its text


def test_a_file_is_converted_once_per_dtype(make_model, tokenizer, write_gguf, tmp_path) -> None:
    path = write_gguf(_original(make_model, "qwen2"), tokenizer, tmp_path / "model.gguf")
    folder = cached_conversion(path, tmp_path / "cache", torch.float32, progress=False)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert cached_conversion(path, tmp_path / "cache", torch.float32, progress=False) == folder
    assert weights.stat().st_mtime_ns == written
    half = cached_conversion(path, tmp_path / "cache", torch.bfloat16, progress=False)
    assert half != folder
    assert AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16


def test_a_changed_file_is_converted_again(make_model, tokenizer, write_gguf, tmp_path) -> None:
    path = write_gguf(_original(make_model, "qwen2"), tokenizer, tmp_path / "model.gguf")
    first = cached_conversion(path, tmp_path / "cache", torch.float32, progress=False)
    write_gguf(_original(make_model, "llama"), tokenizer, path)
    assert cached_conversion(path, tmp_path / "cache", torch.float32, progress=False) != first


def test_a_known_digest_is_kept(make_model, tokenizer, write_gguf, tmp_path) -> None:
    path = write_gguf(_original(make_model, "qwen2"), tokenizer, tmp_path / "model.gguf")
    assert source_sha256(convert_gguf(path, tmp_path / "a", torch.float32, progress=False, digest="abc")) == "abc"
    assert source_sha256(convert_gguf(path, tmp_path / "b", torch.float32, progress=False)) is None
    assert source_sha256(tmp_path) is None


@pytest.mark.parametrize(
    ("architecture", "metadata"), [("mamba", {}), ("llama", {"expert_count": 8})], ids=["architecture", "experts"]
)
def test_other_architectures_are_refused_by_name(make_model, tokenizer, write_gguf, tmp_path, architecture, metadata) -> None:
    path = write_gguf(
        _original(make_model, "llama"), tokenizer, tmp_path / "model.gguf", metadata=metadata, architecture=architecture
    )
    with pytest.raises(UnsupportedModelError, match=f"'{architecture}'"):
        convert_gguf(path, tmp_path / "out", torch.float32, progress=False)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused_and_leave_nothing_behind(make_model, tokenizer, write_gguf, tmp_path, share) -> None:
    path = write_gguf(_original(make_model, "qwen2"), tokenizer, tmp_path / "model.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelLoadError, match="truncated"):
        cached_conversion(path, tmp_path / "cache", torch.float32, progress=False)
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(ModelLoadError, match="no valid GGUF"):
        convert_gguf(path, tmp_path / "out", torch.float32, progress=False)


@pytest.mark.parametrize("key", ["embedding_length", "attention.head_count", "context_length"])
def test_missing_metadata_is_named(make_model, tokenizer, write_gguf, tmp_path, key) -> None:
    path = write_gguf(_original(make_model, "qwen2"), tokenizer, tmp_path / "model.gguf", metadata={key: None})
    with pytest.raises(ModelLoadError, match=rf"qwen2\.{key}"):
        convert_gguf(path, tmp_path / "out", torch.float32, progress=False)


def test_unknown_tensors_are_named(make_model, tokenizer, write_gguf, tmp_path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    path = write_gguf(_original(make_model, "qwen2"), tokenizer, tmp_path / "model.gguf", extra_tensors=extra)
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_sinks\.weight"):
        convert_gguf(path, tmp_path / "out", torch.float32, progress=False)
