"""What sequential heads read at the nodes of a level, against plain torch."""

from __future__ import annotations

import pytest
import torch

from medusa_core.kernels.head_inputs import join_inputs
from medusa_core.model.sequential_heads import joined_inputs
from tests import options


@pytest.mark.parametrize("hidden_size", [32, 48])
@pytest.mark.parametrize(("num_lanes", "num_parents", "num_nodes"), [(1, 1, 1), (3, 1, 1), (2, 4, 3), (1, 2, 5)])
def test_states_embeddings_and_tokens_of_a_level(hidden_size, num_lanes, num_parents, num_nodes):
    generator = torch.Generator().manual_seed(num_nodes)
    state = torch.randn(num_parents, num_lanes, hidden_size, generator=generator)
    lists = torch.randint(50, (num_parents, num_lanes, 6), generator=generator)
    embedding = torch.randn(50, hidden_size, generator=generator)
    parent = torch.randint(num_parents, (num_nodes,), generator=generator)
    rank = torch.randint(6, (num_nodes,), generator=generator)
    inputs = [tensor.to(options.device) for tensor in (state, lists, parent, rank, embedding)]
    states, joined, tokens = (tensor.cpu() for tensor in join_inputs(*inputs, eps=1e-6))
    assert torch.equal(states, state[parent].flatten(0, 1))
    assert torch.equal(tokens, lists[parent, :, rank].flatten())
    torch.testing.assert_close(joined, joined_inputs(states, embedding[tokens]))


@pytest.mark.parametrize("num_columns", [7, 16])
@pytest.mark.parametrize("has_map", [False, True])
def test_a_token_is_found_among_keys_in_any_order(num_columns, has_map):
    generator = torch.Generator().manual_seed(num_columns)
    num_lanes, num_parents = 3, 2
    logits = torch.randn(num_parents, num_lanes, num_columns, generator=generator)
    logits[0, 0, 1:3] = 9.0  # equals: the lower column is the better one
    keys = topk_keys(logits)
    token_map = torch.randperm(50, generator=generator)[:num_columns]
    parent, rank = torch.tensor([0, 1, 0, 0]), torch.tensor([1, 0, 6, 0])
    state, embedding = torch.randn(num_parents, num_lanes, 32, generator=generator), torch.randn(50, 32, generator=generator)
    shuffled = keys[..., torch.randperm(num_columns, generator=generator)]
    inputs = [tensor.to(options.device) for tensor in (state, shuffled, parent, rank, embedding)]
    mapped = token_map.to(options.device) if has_map else None
    _, joined, tokens = (tensor.cpu() for tensor in join_inputs(*inputs, eps=1e-6, has_keys=True, token_map_V=mapped))
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    expected = order[parent, :, rank].flatten()
    assert torch.equal(tokens, token_map[expected] if has_map else expected)
    torch.testing.assert_close(joined, joined_inputs(state[parent].flatten(0, 1), embedding[tokens]))


def topk_keys(logits: torch.Tensor) -> torch.Tensor:
    """`kernels.topk.pack`, of numbers without zeros."""
    bits = logits.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (0x7FFFFFFF - torch.arange(logits.shape[-1]))
