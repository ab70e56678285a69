"""Penalties on the nodes of trees against torch, node by node."""

from __future__ import annotations

import pytest
import torch

from medusa_core.kernels.penalties import penalize_nodes
from medusa_core.sampling.penalties import PenaltyRows, penalize
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.tree.topology import TreeTopology
from tests import options

NUM_LANES = 4
TREES = {
    "root": TreeTopology(()),
    "chain": TreeTopology.chain(3),
    "bushy": TreeTopology.from_choices([(0,), (1,), (0, 0), (1, 0), (0, 1), (1, 0, 0)]),
}


@pytest.mark.parametrize("vocab_size", [50, 4096, 5000])
@pytest.mark.parametrize("tree", TREES)
def test_each_node_is_penalized_for_the_path_to_it(tree, vocab_size):
    topology = TREES[tree]
    generator = torch.Generator().manual_seed(vocab_size)

    def ints(high, *shape):
        return torch.randint(high, shape, generator=generator)

    def floats(low, high):
        return low + (high - low) * torch.rand(NUM_LANES, generator=generator)

    state = {
        "has_penalties_P": torch.tensor([1, 0, 1, 1]),
        "repetition_P": floats(0.5, 2.0),
        "frequency_P": floats(-2.0, 2.0),
        "presence_P": floats(-2.0, 2.0),
        "count_PV": ints(3, NUM_LANES, vocab_size).int(),
        "is_prompt_PV": ints(2, NUM_LANES, vocab_size).bool(),
        "bias_PV": torch.randn(NUM_LANES, vocab_size, generator=generator),
    }
    lanes = [2, 1, 0]
    num_nodes = topology.num_nodes
    logits = torch.randn(len(lanes) * num_nodes, vocab_size, generator=generator)
    # few ids, so that a path holds some more than once
    token = ints(4, len(lanes) * num_nodes)
    expected = logits.clone()
    for row in range(len(logits)):
        lane, node = lanes[row // num_nodes], row % num_nodes
        if lane == 1:
            continue
        count_RV = state["count_PV"][lane : lane + 1].clone()
        while node > 0:
            count_RV[0, token[row // num_nodes * num_nodes + node]] += 1
            node = topology.parents[node]
        one = slice(lane, lane + 1)
        rows = PenaltyRows(
            repetition_R=state["repetition_P"][one],
            frequency_R=state["frequency_P"][one],
            presence_R=state["presence_P"][one],
            count_RV=count_RV,
            is_prompt_RV=state["is_prompt_PV"][one],
            bias_RV=state["bias_PV"][one],
        )
        expected[row] = penalize(logits[row : row + 1], rows)[0]
    actual = logits.to(options.device)
    penalize_nodes(
        actual,
        lane_R=torch.tensor(lanes).repeat_interleave(num_nodes).to(options.device),
        token_R=token.to(options.device),
        parent_N=DeviceTree.create(topology, torch.device(options.device)).parent_N,
        **{name: tensor.to(options.device) for name, tensor in state.items()},
    )
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-6)
    # lane 1 asks for nothing
    assert torch.equal(actual[num_nodes : 2 * num_nodes].cpu(), logits[num_nodes : 2 * num_nodes])
