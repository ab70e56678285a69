"""Typical acceptance (Medusa, arXiv:2401.10774, 3.3.1): drafts are kept that the model could well have said, drawn or not.

A draft x behind a path is accepted if p(x | path) > min(epsilon, delta * exp(-H)), where p is what tokens are drawn from, at the
request's temperature, and H its entropy in nats. The longest path of accepted drafts is taken, then a token is drawn as ever. So
steps emit more, but the output is no longer distributed as the model's: only requests that ask for it are verified so.

Shapes: N nodes · V vocabulary · R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_core.sampling.sampler import SamplingRows, process, temper
from medusa_core.speculation.device_tree import DeviceTree


def force_typical(logits_NV: Tensor, tokens_N: Tensor, tree: DeviceTree, row: SamplingRows, index_1: Tensor) -> Tensor:
    """What one lane's nodes draw for certain, as their path is taken; -1 where a token is drawn as ever. int64 [N].

    Of several longest paths, the one that ends at the first node.

    Args:
        logits_NV: float32, the model's logits at each node.
        row: parameters of the lane, one row. index_1: index of the root's draw in the output.
    """
    parents, tokens = tree.parent_N.tolist(), tokens_N.tolist()
    forced_N = torch.full_like(tokens_N, -1)
    # of accepted nodes: what their children are measured by
    measures: dict[int, tuple[Tensor, float]] = {}
    best, paths = 0, {0: [0]}
    for node in range(1, len(parents)):
        parent = parents[node]
        # no token is -1: a node that was taken out of the tree
        if parent not in paths or tokens[node] < 0:
            continue
        if parent not in measures:
            path = paths[parent]
            measures[parent] = _measure(logits_NV[parent], [tokens[n] for n in path[1:]], row, index_1 + len(path) - 1)
        logprob_V, least = measures[parent]
        if float(logprob_V[tokens[node]]) > least:
            paths[node] = [*paths[parent], node]
            if len(paths[node]) > len(paths[best]):
                best = node
    visited = {0}
    for node in paths[best][1:]:
        # the first of the nodes whose path holds the same tokens stands for all (speculation/verify.py)
        forced_N[min(visited)] = tokens[node]
        visited = {child for child, parent in enumerate(parents) if parent in visited and tokens[child] == tokens[node]}
    return forced_N


def _measure(logits_V: Tensor, path_tokens: list[int], row: SamplingRows, index_1: Tensor) -> tuple[Tensor, float]:
    """(log-probabilities behind a path, what an accepted one must exceed)."""
    # a copy that can be counted on
    row = row.take(torch.zeros(1, dtype=torch.int64, device=logits_V.device))
    if row.penalties is not None:
        for token in path_tokens:
            row.penalties.count(torch.zeros_like(index_1), torch.full_like(index_1, token))
    logprob_V = temper(process(logits_V.unsqueeze(0), row, index_1), row).log_softmax(dim=-1).squeeze(0)
    entropy = -torch.xlogy(logprob_V.exp(), logprob_V.exp()).sum()
    return logprob_V, float(torch.minimum(row.epsilon_R.log(), row.delta_R.log() - entropy))
