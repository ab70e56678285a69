"""Every checkpoint layout loads to the same heads; what does not fit is refused by name."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa_core.errors import HeadsMismatchError, ModelLoadError
from medusa_core.model.checkpoint import has_heads, load_heads

K, E, V = 3, 32, 320


def _blocks(pattern: str, num_layers: int = 1, *, has_bias: bool = True) -> dict[str, Tensor]:
    """Blocks of K heads; the values depend on head and layer only, so layouts can be compared."""
    tensors = {}
    for head in range(K):
        for layer in range(num_layers):
            generator = torch.Generator().manual_seed(10 * head + layer)
            name = pattern.format(head=head, layer=layer)
            tensors[f"{name}.weight"] = torch.randn(E, E, generator=generator)
            if has_bias:
                tensors[f"{name}.bias"] = torch.randn(E, generator=generator)
    return tensors


def _lm_heads(pattern: str, num_rows: int = V) -> dict[str, Tensor]:
    return {
        pattern.format(head=head): torch.randn(num_rows, E, generator=torch.Generator().manual_seed(100 + head))
        for head in range(K)
    }


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture
def hidden_BE() -> Tensor:
    return torch.randn(2, E, generator=torch.Generator().manual_seed(3))


SEQUENTIAL = "{head}.{layer}.linear"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_shared_lm_head_layout(loaded, hidden_BE, tmp_path, suffix) -> None:
    heads = load_heads(_save(tmp_path / f"medusa_lm_head.{suffix}", _blocks(SEQUENTIAL)), loaded)
    assert (heads.num_heads, heads.num_layers, heads.layout) == (K, 1, "shared lm_head")
    assert heads(hidden_BE, loaded.project).shape == (2, K, V)


@pytest.mark.parametrize(
    ("block_pattern", "lm_head_pattern"),
    [
        (SEQUENTIAL, "{head}.2.weight"),
        ("medusa_head.{head}.{layer}.linear", "medusa_head.{head}.2.weight"),
        ("medusa_heads.{head}.{layer}.linear", "medusa_heads.{head}.2.weight"),
        ("blocks.{head}.layers.{layer}", "lm_heads.{head}.weight"),
    ],
)
def test_own_lm_head_layouts_are_the_same_heads(loaded, hidden_BE, tmp_path, block_pattern, lm_head_pattern) -> None:
    tensors = _blocks(block_pattern, num_layers=2) | _lm_heads(lm_head_pattern)
    heads = load_heads(_save(tmp_path / "heads.safetensors", tensors), loaded)
    reference = load_heads(
        _save(tmp_path / "reference.pt", _blocks(SEQUENTIAL, num_layers=2) | _lm_heads("{head}.2.weight")), loaded
    )
    assert (heads.num_heads, heads.num_layers, heads.layout) == (K, 2, "own lm_head")
    assert torch.equal(heads(hidden_BE, loaded.project), reference(hidden_BE, loaded.project))


def test_biases_are_used(loaded, hidden_BE, tmp_path) -> None:
    with_bias = load_heads(_save(tmp_path / "a.safetensors", _blocks(SEQUENTIAL)), loaded)
    without = load_heads(_save(tmp_path / "b.safetensors", _blocks(SEQUENTIAL, has_bias=False)), loaded)
    assert without.bias_LKE is None
    assert not torch.allclose(with_bias(hidden_BE, loaded.project), without(hidden_BE, loaded.project))


def test_heads_among_the_tensors_of_a_merged_model(loaded, tmp_path) -> None:
    base = {"model.embed_tokens.weight": torch.zeros(V, E), "lm_head.weight": torch.zeros(V, E)}
    _save(tmp_path / "model-00001-of-00002.safetensors", base)
    _save(tmp_path / "model-00002-of-00002.safetensors", _blocks("medusa_head.{head}.{layer}.linear"))
    assert has_heads(tmp_path)
    assert load_heads(tmp_path, loaded).num_heads == K


def test_a_model_folder_without_heads_has_none(model_folder) -> None:
    assert not has_heads(model_folder())


def test_one_copy_of_a_repeated_block_is_applied_as_often_as_it_was(loaded, hidden_BE, tmp_path) -> None:
    tied = _blocks(SEQUENTIAL) | _lm_heads("{head}.3.weight")
    copies = {
        name.replace(".0.linear", f".{layer}.linear"): t.clone() for layer in range(3) for name, t in _blocks(SEQUENTIAL).items()
    }
    spelled_out = copies | _lm_heads("{head}.3.weight")
    heads = load_heads(_save(tmp_path / "tied.safetensors", tied), loaded)
    expected = load_heads(_save(tmp_path / "all.safetensors", spelled_out), loaded)
    assert heads.num_layers == expected.num_layers == 3
    assert torch.equal(heads(hidden_BE, loaded.project), expected(hidden_BE, loaded.project))


@pytest.mark.parametrize(("num_rows", "num_kept"), [(V + 64, V), (V - 20, V - 20)])
def test_lm_heads_wider_than_the_vocabulary_are_cut_and_narrower_ones_kept(loaded, hidden_BE, tmp_path, num_rows, num_kept) -> None:
    tensors = _blocks(SEQUENTIAL) | _lm_heads("{head}.1.weight", num_rows)
    heads = load_heads(_save(tmp_path / "heads.safetensors", tensors), loaded)
    assert heads.draft_vocab_size == num_kept
    assert int(heads.topk(hidden_BE, heads.num_heads, 10, project=loaded.project).max()) < V


def test_vllm_token_map_with_truncated_lm_heads(loaded, hidden_BE, tmp_path) -> None:
    token_map = torch.tensor([300, 5, 20, 7, 9, 11])
    tensors = _blocks("blocks.{head}.layers.{layer}") | _lm_heads("lm_heads.{head}.weight", 6) | {"token_map": token_map}
    heads = load_heads(_save(tmp_path / "heads.safetensors", tensors), loaded)
    draft_ids = heads(hidden_BE, loaded.project).argmax(-1)
    assert torch.equal(heads.topk(hidden_BE, heads.num_heads, 1, project=loaded.project)[..., 0], token_map[draft_ids])


def test_vllm_original_lm_head_is_the_base_models(loaded, hidden_BE, tmp_path) -> None:
    base = loaded.model.lm_head.weight.detach().clone()
    blocks = _blocks("blocks.{head}.layers.{layer}")
    heads = load_heads(_save(tmp_path / "a.safetensors", blocks | {"lm_head.weight": base}), loaded)
    assert heads.layout == "shared lm_head"
    cut = load_heads(_save(tmp_path / "b.safetensors", blocks | {"lm_head.weight": base[:100].clone()}), loaded)
    expected = heads(hidden_BE, loaded.project)[..., :100]
    torch.testing.assert_close(cut(hidden_BE, loaded.project), expected)


@pytest.mark.parametrize("draft_vocab_size", [100, None])
def test_a_reduced_draft_vocabulary_is_the_first_ids(loaded, hidden_BE, tmp_path, draft_vocab_size) -> None:
    path = _save(tmp_path / "heads.safetensors", _blocks(SEQUENTIAL))
    full = load_heads(path, loaded, draft_vocab_size=None)(hidden_BE, loaded.project)
    heads = load_heads(path, loaded, draft_vocab_size=draft_vocab_size)
    torch.testing.assert_close(heads(hidden_BE, loaded.project), full[..., :draft_vocab_size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.0.linear.weight": torch.zeros(16, 16)}, r"0\.0\.linear\.weight has shape \[16, 16\].*needs \[32, 32\]"),
        ({"1.0.linear.bias": torch.zeros(8)}, r"1\.0\.linear\.bias has shape \[8\].*needs \[32\]"),
        ({"0.1.weight": torch.zeros(V, 16)}, "have an lm_head"),
        ({"5.0.linear.weight": torch.zeros(E, E)}, "incomplete"),
        ({"fc.weight": torch.zeros(E, E)}, r"no Medusa heads: fc\.weight"),
        ({"token_map": torch.tensor([V])}, "outside the base vocabulary"),
        ({"token_map": torch.zeros(2, 2)}, "list of token ids"),
    ],
)
def test_heads_that_do_not_fit_are_refused_with_the_tensor_and_the_remedy(loaded, tmp_path, change, message) -> None:
    path = _save(tmp_path / "heads.safetensors", _blocks(SEQUENTIAL) | change)
    with pytest.raises(HeadsMismatchError, match=message) as refused:
        load_heads(path, loaded)
    assert "--heads" in str(refused.value)


def test_lm_heads_of_another_width_are_refused(loaded, tmp_path) -> None:
    wrong = {name: torch.zeros(V, 16) for name in _lm_heads("{head}.1.weight")}
    path = _save(tmp_path / "heads.safetensors", _blocks(SEQUENTIAL) | wrong)
    with pytest.raises(HeadsMismatchError, match=r"0\.1\.weight has shape \[320, 16\]"):
        load_heads(path, loaded)


def test_a_model_is_no_heads(loaded, model_folder) -> None:
    with pytest.raises(HeadsMismatchError, match="no Medusa heads"):
        load_heads(model_folder("qwen2"), loaded)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def test_pickled_code_is_refused_and_never_run(loaded, tmp_path, capsys) -> None:
    path = tmp_path / "heads.pt"
    torch.save({"0.0.linear.weight": _Payload()}, path)
    with pytest.raises(ModelLoadError, match="pickled Python objects"):
        load_heads(path, loaded)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_files_are_refused(loaded, tmp_path, suffix) -> None:
    path = _save(tmp_path / f"heads.{suffix}", _blocks(SEQUENTIAL))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelLoadError, match=r"heads\."):
        load_heads(path, loaded)


def test_an_empty_folder_is_refused(loaded, tmp_path) -> None:
    with pytest.raises(ModelLoadError, match="holds no Medusa heads"):
        load_heads(tmp_path / "missing", loaded)


@pytest.mark.parametrize(("trained_for", "is_warned"), [("aa", True), ("bb", False)])
def test_heads_trained_for_another_file_are_announced(loaded, tmp_path, caplog, trained_for, is_warned) -> None:
    path = _save(tmp_path / "heads.safetensors", _blocks(SEQUENTIAL), {"base_sha256": trained_for})
    with caplog.at_level(logging.WARNING):
        load_heads(path, replace(loaded, source_sha256="bb"))
    assert ("expect few accepted tokens" in caplog.text) is is_warned
