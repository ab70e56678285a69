"""Typical acceptance against its definition, and what it leaves alone."""

from __future__ import annotations

import math

import torch

from medusa_core.params import SamplingParams
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.typical import force_typical
from medusa_core.speculation.verify import walk_tree
from medusa_core.tree.topology import TreeTopology
from tests import options
from tests.sampling.test_sampler import make_rows

VOCAB = 12
BUSHY = TreeTopology.from_choices([(0,), (1,), (0, 0), (1, 0), (0, 1), (1, 0, 0), (2,)])


def by_definition(logits_NV: torch.Tensor, tokens: list[int], params: SamplingParams) -> list[int]:
    """Nodes of the longest accepted path behind the root, the one that ends first."""
    epsilon, delta = params.typical_acceptance
    paths = [[]]
    for node in range(1, BUSHY.num_nodes):
        path, current = [], node
        while current > 0:
            parent = BUSHY.parents[current]
            weights = [math.exp(logit / params.temperature) for logit in logits_NV[parent].tolist()]
            shares = [weight / sum(weights) for weight in weights]
            entropy = -sum(share * math.log(share) for share in shares)
            if shares[tokens[current]] <= min(epsilon, delta * math.exp(-entropy)):
                break
            path, current = [current, *path], parent
        else:
            paths.append(path)
    return max(paths, key=lambda path: (len(path), -path[-1] if path else 0))


def test_the_longest_typical_path_is_taken():
    generator = torch.Generator().manual_seed(2)
    tree = DeviceTree.create(BUSHY, torch.device(options.device))
    lengths = set()
    for trial in range(60):
        params = SamplingParams(temperature=0.7, seed=trial, typical_acceptance=(0.2, (0.2, 0.45, 0.9)[trial % 3]))
        logits_NV = torch.randn(BUSHY.num_nodes, VOCAB, generator=generator) * 1.5
        tokens_N = torch.randint(VOCAB, (BUSHY.num_nodes,), generator=generator)
        path = by_definition(logits_NV, tokens_N.tolist(), params)
        lengths.add(len(path))
        expected = [-1] * BUSHY.num_nodes
        # few tokens, so some nodes are the same draft; the first of these is asked
        visited = [0]
        for node in path:
            expected[min(visited)] = int(tokens_N[node])
            visited = [n for n in range(BUSHY.num_nodes) if BUSHY.parents[n] in visited and tokens_N[n] == tokens_N[node]]
        rows = make_rows([params])
        index = torch.zeros(1, dtype=torch.int64, device=options.device)
        forced = force_typical(logits_NV.to(options.device), tokens_N.to(options.device), tree, rows, index)
        assert forced.tolist() == expected
    assert lengths == {0, 1, 2, 3}


def test_a_walk_takes_the_path_and_draws_behind_it_and_leaves_other_lanes_alone():
    generator = torch.Generator().manual_seed(4)
    tree = DeviceTree.create(BUSHY, torch.device(options.device))
    params = [
        SamplingParams(temperature=0.9, seed=1, typical_acceptance=(0.05, 0.2)),
        SamplingParams(temperature=0.9, seed=2),
        # what a greedy lane says is one token
        SamplingParams(temperature=0.0),
    ]
    rows = make_rows(params, keys=[1, 2, 3])
    exact_rows = make_rows([SamplingParams(temperature=p.temperature, seed=1) for p in params], keys=[1, 2, 3])
    index = torch.zeros(3, dtype=torch.int64, device=options.device)
    gained = 0
    for _ in range(20):
        logits_BNV = torch.randn(3, BUSHY.num_nodes, VOCAB, generator=generator).to(options.device)
        tokens_BN = torch.randint(VOCAB, (3, BUSHY.num_nodes), generator=generator).to(options.device)
        typical, exact = (walk_tree(logits_BNV, tokens_BN, tree, some, index) for some in (rows, exact_rows))
        assert torch.equal(typical.token_ids_BL[1:], exact.token_ids_BL[1:])
        path = by_definition(logits_BNV[0].cpu(), tokens_BN[0].tolist(), params[0])
        length = len(path)
        assert typical.token_ids_BL[0, :length].tolist() == [int(tokens_BN[0, node]) for node in path]
        assert int(typical.length_B[0]) >= length + 1
        gained += length - int(exact.length_B[0]) + 1
    assert gained > 10
