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
    state = torch.randn(num_lanes, num_parents, hidden_size, generator=generator)
    lists = torch.randint(50, (num_lanes, num_parents, 6), generator=generator)
    embedding = torch.randn(50, hidden_size, generator=generator)
    parent = torch.randint(num_parents, (num_nodes,), generator=generator)
    rank = torch.randint(6, (num_nodes,), generator=generator)
    inputs = [tensor.to(options.device) for tensor in (state, lists, parent, rank, embedding)]
    states, joined, tokens = (tensor.cpu() for tensor in join_inputs(*inputs, eps=1e-6))
    assert torch.equal(states, state[:, parent].flatten(0, 1))
    assert torch.equal(tokens, lists[:, parent, rank].flatten())
    torch.testing.assert_close(joined, joined_inputs(states, embedding[tokens]))
