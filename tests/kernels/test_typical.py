"""Typical acceptance on kernels against torch."""

from __future__ import annotations

import pytest
import torch

from medusa_core.kernels.typical import take_typical_paths
from medusa_core.params import SamplingParams
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.typical import force_typical
from medusa_core.tree.topology import TreeTopology
from tests import options
from tests.sampling.test_sampler import make_rows

TREES = {
    "chain": TreeTopology.chain(4),
    "bushy": TreeTopology.from_choices([(0,), (1,), (0, 0), (1, 0), (0, 1), (1, 0, 0), (2,), (0, 0, 0), (0, 0, 0, 0)]),
    "lookup": TreeTopology.from_choices([(0,), (-1,), (-1, -1), (0, 0), (-1, -1, -1)]),
}
STOPS = [[3, 5, -1]] * 5


@pytest.mark.parametrize("vocab_size", [30, 8192, 9001])
@pytest.mark.parametrize("name", TREES)
def test_the_same_paths_as_torch(name, vocab_size):
    topology = TREES[name]
    device = torch.device(options.device)
    tree = DeviceTree.create(topology, device)
    generator = torch.Generator().manual_seed(vocab_size)
    params = [
        SamplingParams(temperature=0.7, typical_acceptance=(0.09, 0.3)),
        SamplingParams(temperature=1.3, typical_acceptance=(0.01, 0.1)),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, typical_acceptance=(0.02, 0.2), min_tokens=3),
        SamplingParams(temperature=0.5, typical_acceptance=(0.5, 1.0)),
    ]
    rows = make_rows(params, stop_ids=STOPS)
    num_lanes, num_nodes = len(params), topology.num_nodes
    num_taken = 0
    for trial in range(3):
        logits = torch.randn(num_lanes, num_nodes, vocab_size, generator=generator) * 2
        token = torch.randint(8, (num_lanes, num_nodes), generator=generator)
        # probable drafts, and one node that is out of the tree
        logits[:, :, :8] += 9
        token[1, -1] = -1
        logits[0, 0, 9] = float("-inf")
        logits, token = logits.to(device), token.to(device)
        index = torch.tensor([0, 4, 0, 1, 2], device=device)
        drawn = torch.full((num_lanes * num_nodes,), 7777, device=device)
        take_typical_paths(
            drawn,
            logits.flatten(0, 1),
            lane_T=torch.arange(num_lanes, device=device).repeat_interleave(num_nodes),
            token_T=token.flatten(),
            index_T=(index.unsqueeze(1) + tree.depth_N).flatten(),
            parent_N=tree.parent_N,
            depth_N=tree.depth_N,
            max_depth=tree.max_depth,
            temperature_P=rows.temperature_R,
            epsilon_P=rows.epsilon_R,
            delta_P=rows.delta_R,
            min_tokens_P=rows.min_tokens_R,
            stop_ids_PW=rows.stop_ids_RW,
        )
        for lane in range(num_lanes):
            at = torch.tensor([lane], device=device)
            is_typical = params[lane].is_typical
            forced = force_typical(logits[lane], token[lane], tree, rows.take(at), index[at]) if is_typical else None
            expected = [7777] * num_nodes if forced is None else [7777 if t < 0 else t for t in forced.tolist()]
            assert drawn.view(num_lanes, -1)[lane].tolist() == expected, (lane, trial)
            num_taken += sum(value != 7777 for value in expected)
    assert num_taken > 4
