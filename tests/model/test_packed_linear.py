"""Packed layers compute what the originals compute, and are refused where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medusa_core.errors import UnsupportedModelError
from medusa_core.model import packed_linear
from medusa_core.model.packed_linear import PackedLinear, can_pack, pack_linears
from medusa_core.model.projection import Projection

CPU = torch.device("cpu")

needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this build of torch cannot pack weights")


def make_linear(in_features: int = 48, out_features: int = 80, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (2, 8), (1, 64), (65,)])
@torch.inference_mode()
def test_equal_up_to_rounding(shape, bias):
    linear = make_linear(bias=bias)
    parent = nn.Sequential(linear)
    pack_linears([parent])
    x = torch.randn(*shape, 48).bfloat16()
    actual = parent(x)
    assert type(parent[0]) is PackedLinear
    assert (actual.shape, actual.dtype) == ((*shape, 80), torch.bfloat16)
    torch.testing.assert_close(actual, linear(x), rtol=2**-7, atol=2**-7)


@needs_packing
def test_layers_at_any_depth_are_replaced_and_others_stay():
    embedding = nn.Embedding(10, 48, dtype=torch.bfloat16)
    inner = nn.ModuleDict({"up": make_linear(48, 96), "down": make_linear(96, 48), "act": nn.SiLU()})
    model = nn.ModuleList([embedding, inner, make_linear()])
    assert pack_linears([model]) == 3
    assert [type(module) for module in (inner["up"], inner["down"], model[2])] == [PackedLinear] * 3
    assert model[0] is embedding
    assert type(inner["act"]) is nn.SiLU
    assert (inner["up"].in_features, inner["up"].out_features) == (48, 96)


@needs_packing
def test_a_layer_in_several_places_is_packed_once():
    """A model's lm_head is part of its projection too; two copies would cost twice the memory."""
    lm_head = make_linear()
    model, projection = nn.ModuleDict({"lm_head": lm_head}), nn.ModuleDict({"linear": lm_head})
    assert pack_linears([model, projection]) == 1
    assert model["lm_head"] is projection["linear"]


@needs_packing
def test_a_weight_tied_to_an_embedding_stays_with_the_embedding():
    embedding = nn.Embedding(80, 48, dtype=torch.bfloat16)
    lm_head = make_linear()
    lm_head.weight = embedding.weight
    before = embedding.weight.clone()
    pack_linears([nn.ModuleList([embedding, lm_head])])
    assert torch.equal(embedding.weight, before)


@needs_packing
def test_subclasses_are_left_alone():
    """They may compute something else in `forward`."""

    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubling(8, 8, dtype=torch.bfloat16))
    assert pack_linears([model]) == 0
    assert type(model[0]) is Doubling


@needs_packing
@pytest.mark.parametrize("defect", [lambda out: out * 1.02, lambda out: out.roll(1, dims=-1), lambda out: out * torch.nan])
def test_a_wrong_packed_product_is_refused(monkeypatch, defect):
    forward = PackedLinear.forward
    monkeypatch.setattr(packed_linear.PackedLinear, "forward", lambda self, x: defect(forward(self, x)))
    with pytest.raises(UnsupportedModelError, match=r"48 x 80 differs .* --dtype float32"):
        pack_linears([nn.Sequential(make_linear())])


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.float16), ("cuda", torch.bfloat16)])
def test_other_formats_and_devices_are_not_packed(device, dtype):
    assert not can_pack(torch.device(device), dtype)


@needs_packing
def test_a_packed_projection_knows_its_width():
    projection = Projection(make_linear())
    pack_linears([projection])
    assert type(projection.linear) is PackedLinear
    assert projection.num_tokens == projection(torch.zeros(1, 48, dtype=torch.bfloat16)).shape[-1] == 80
