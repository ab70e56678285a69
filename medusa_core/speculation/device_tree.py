"""A tree topology as device tensors, for each of its nested sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.tree.topology import TreeTopology


@dataclass(frozen=True, slots=True)
class DeviceTree:
    """N nodes, the root first; parents precede children.

    parent_N (root -1), depth_N (root 0), rank_N (rank in its head's list; root -1): int64. ancestor_mask_NN: bool, self included.
    """

    parent_N: Tensor
    depth_N: Tensor
    rank_N: Tensor
    ancestor_mask_NN: Tensor
    max_depth: int

    @property
    def num_nodes(self) -> int:
        return self.parent_N.shape[0]

    @classmethod
    def create(cls, topology: TreeTopology, device: torch.device) -> DeviceTree:
        bits = topology.ancestor_mask
        mask = [[bool(bits[i] >> j & 1) for j in range(topology.num_nodes)] for i in range(topology.num_nodes)]
        return cls(
            parent_N=torch.tensor(topology.parents, dtype=torch.int64, device=device),
            depth_N=torch.tensor(topology.depths, dtype=torch.int64, device=device),
            rank_N=torch.tensor(topology.ranks, dtype=torch.int64, device=device),
            ancestor_mask_NN=torch.tensor(mask, dtype=torch.bool, device=device),
            max_depth=topology.max_depth,
        )

    @classmethod
    def causal(cls, num_tokens: int, device: torch.device) -> DeviceTree:
        """A chain of `num_tokens` nodes: how known tokens in a row (a prompt chunk) look to attention."""
        index = torch.arange(num_tokens, device=device)
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
        return cls(index - 1, index, torch.zeros_like(index), mask, num_tokens - 1)
