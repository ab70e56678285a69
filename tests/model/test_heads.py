"""The stacked heads against a plain loop over heads and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.model.heads import MedusaHeads
from medusa_core.model.projection import Projection

B, K, E, V = 3, 4, 16, 50


def _tensors(num_layers: int, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(num_layers)
    weight_LKEE = torch.randn(num_layers, K, E, E, generator=generator)
    return weight_LKEE, torch.randn(num_layers, K, E, generator=generator) if has_bias else None


def _slow_hidden(hidden_E: Tensor, weight_LKEE: Tensor, bias_LKE: Tensor | None, head: int) -> Tensor:
    x_E = hidden_E
    for layer in range(len(weight_LKEE)):
        bias_E = None if bias_LKE is None else bias_LKE[layer, head]
        x_E = x_E + functional.silu(functional.linear(x_E, weight_LKEE[layer, head], bias_E))
    return x_E


@pytest.fixture
def projection() -> Projection:
    torch.manual_seed(1)
    return Projection(torch.nn.Linear(E, V, bias=False), softcap=30.0).requires_grad_(False)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_shared_lm_head_equals_a_loop_over_heads(projection, num_layers, has_bias) -> None:
    weight_LKEE, bias_LKE = _tensors(num_layers, has_bias)
    hidden_BE = torch.randn(B, E)
    logits_BKV = MedusaHeads(weight_LKEE, bias_LKE)(hidden_BE, projection)
    assert logits_BKV.shape == (B, K, V)
    for b in range(B):
        for k in range(K):
            expected_V = projection(_slow_hidden(hidden_BE[b], weight_LKEE, bias_LKE, k))
            torch.testing.assert_close(logits_BKV[b, k], expected_V, atol=1e-4, rtol=1e-4)


def test_own_lm_heads_equal_a_loop_over_heads(projection) -> None:
    weight_LKEE, bias_LKE = _tensors(1, True)
    lm_head_KVE = torch.randn(K, V, E)
    hidden_BE = torch.randn(B, E)
    logits_BKV = MedusaHeads(weight_LKEE, bias_LKE, lm_head_KVE=lm_head_KVE)(hidden_BE, projection)
    for k in range(K):
        expected_BV = torch.stack([lm_head_KVE[k] @ _slow_hidden(hidden_E, weight_LKEE, bias_LKE, k) for hidden_E in hidden_BE])
        torch.testing.assert_close(logits_BKV[:, k], expected_BV, atol=1e-4, rtol=1e-4)


def test_logits_are_float32_whatever_the_weights_are(projection) -> None:
    weight_LKEE, bias_LKE = _tensors(1, True)
    heads = MedusaHeads(weight_LKEE, bias_LKE, lm_head_KVE=torch.randn(K, V, E)).to(torch.bfloat16)
    assert heads(torch.randn(B, E).bfloat16(), projection).dtype == torch.float32


def test_a_draft_vocabulary_gives_base_ids(projection) -> None:
    token_map_V = torch.tensor([40, 3, 17, 8])
    weight_LKEE, bias_LKE = _tensors(1, True)
    heads = MedusaHeads(weight_LKEE, bias_LKE, draft_projection=projection.restricted_to(token_map_V), token_map_V=token_map_V)
    hidden_BE = torch.randn(B, E)
    full_BKV = MedusaHeads(weight_LKEE, bias_LKE)(hidden_BE, projection)
    expected_BKC = token_map_V[full_BKV[..., token_map_V].topk(2).indices]
    assert torch.equal(heads.topk(hidden_BE, heads.num_heads, 2, project=projection), expected_BKC)
    assert heads.draft_vocab_size == 4


def test_one_request_gets_the_same_candidates_alone_and_in_a_batch(projection) -> None:
    heads = MedusaHeads(*_tensors(2, True))
    hidden_BE = torch.randn(B, E)
    alone = torch.cat([heads.topk(hidden_BE[b : b + 1], heads.num_heads, 3, project=projection) for b in range(B)])
    assert torch.equal(heads.topk(hidden_BE, heads.num_heads, 3, project=projection), alone)


def test_the_first_heads_alone(projection) -> None:
    heads = MedusaHeads(*_tensors(1, True))
    hidden_BE = torch.randn(B, E)
    full_BKC = heads.topk(hidden_BE, heads.num_heads, 3, project=projection)
    assert torch.equal(heads.topk(hidden_BE, 1, 3, project=projection), full_BKC[:, :1])
