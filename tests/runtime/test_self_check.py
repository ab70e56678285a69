"""The check at start-up passes what is right and refuses planted defects."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from medusa_core.attention.segments import AttentionBackend, AttentionParams, Segment
from medusa_core.attention.torch_backend import TorchAttention
from medusa_core.errors import UnsupportedModelError
from medusa_core.model.attention_hook import ATTENTION_NAME, install_attention, probe_layer_shapes
from medusa_core.runtime.self_check import attention_reference, check_attention
from tests.equivalence.models import ARCHITECTURES, MAX_MODEL_LEN, tiny_model


def check(architecture: str, attention: AttentionBackend | None = None, max_model_len: int = MAX_MODEL_LEN) -> None:
    loaded = tiny_model(architecture)
    install_attention(loaded.model)
    try:
        reference = attention_reference(loaded.model, loaded.project, max_model_len)
        check_attention(loaded.model, reference, probe_layer_shapes(loaded.model), attention or TorchAttention(), max_model_len)
    finally:
        assert loaded.model.config._attn_implementation == ATTENTION_NAME


class FlatTree(TorchAttention):
    """Lets every node see all nodes before it, as if the tree were a chain."""

    def attend(self, query_BNHD, key_slots_SGD, value_slots_SGD, segment: Segment, params: AttentionParams) -> Tensor:
        mask = torch.ones_like(segment.ancestor_mask_NN).tril()
        flat = dataclasses.replace(segment, ancestor_mask_NN=mask, mask_cache={})
        return super().attend(query_BNHD, key_slots_SGD, value_slots_SGD, flat, params)


class WithoutPrefix(TorchAttention):
    """Sees this step's tokens only, never what is cached."""

    def attend(self, query_BNHD, key_slots_SGD, value_slots_SGD, segment: Segment, params: AttentionParams) -> Tensor:
        num_cached = int(segment.base_B.min())
        blind = dataclasses.replace(
            segment,
            base_B=segment.base_B - num_cached,
            context_slots_BC=segment.context_slots_BC[:, num_cached:],
            block_size=1,
            mask_cache={},
        )
        return super().attend(query_BNHD, key_slots_SGD, value_slots_SGD, blind, params)


class Ignoring(TorchAttention):
    """Drops one of a layer's parameters."""

    def __init__(self, name: str) -> None:
        self._name = name

    def attend(self, query_BNHD, key_slots_SGD, value_slots_SGD, segment: Segment, params: AttentionParams) -> Tensor:
        params = dataclasses.replace(params, **{self._name: None})
        return super().attend(query_BNHD, key_slots_SGD, value_slots_SGD, segment, params)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_architectures_pass(architecture):
    check(architecture)


@pytest.mark.parametrize("max_model_len", [2, 3, 4, 5, 16, 17])
def test_short_limits_are_no_obstacle(max_model_len):
    check("mistral", max_model_len=max_model_len)


def test_an_ignored_tree_mask_is_refused():
    with pytest.raises(UnsupportedModelError, match="a tree of draft tokens"):
        check("llama", FlatTree())


def test_an_ignored_prefix_is_refused():
    with pytest.raises(UnsupportedModelError, match="a tree of draft tokens"):
        check("llama", WithoutPrefix())


@pytest.mark.parametrize(("architecture", "parameter"), [("mistral", "window"), ("gemma2", "softcap"), ("gpt_oss", "sinks_H")])
def test_an_ignored_parameter_is_refused(architecture, parameter):
    with pytest.raises(UnsupportedModelError, match=r"relative error .* tolerance"):
        check(architecture, Ignoring(parameter))


def test_a_rotary_embedding_that_looks_at_the_longest_position_is_refused(monkeypatch):
    rotary = tiny_model("llama").model.model.rotary_emb
    forward = rotary.forward

    def stretched(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        is_long = bool(position_ids.max() > MAX_MODEL_LEN // 2)
        return forward(x, position_ids // 2 if is_long else position_ids)

    monkeypatch.setattr(rotary, "forward", stretched)
    with pytest.raises(UnsupportedModelError, match="beside a long one"):
        check("llama")


@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_model_whose_numbers_overflow_is_refused(monkeypatch, num_rows):
    """In its own attention (1 row), or in ours only: the tree has 7."""
    norm = tiny_model("llama").model.model.norm
    forward = norm.forward

    def overflowing(x: Tensor) -> Tensor:
        is_tree = x.shape[1] == num_rows and (num_rows == 1 or implementation() == ATTENTION_NAME)
        return forward(x) * (torch.nan if is_tree else 1.0)

    def implementation() -> str:
        return tiny_model("llama").model.config._attn_implementation

    monkeypatch.setattr(norm, "forward", overflowing)
    with pytest.raises(UnsupportedModelError, match="out of range .* --dtype" if num_rows == 1 else "relative error nan"):
        check("llama")
