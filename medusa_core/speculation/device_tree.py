"""A tree topology as device tensors, for each of its nested sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.tree.topology import TreeTopology, is_lookup


@dataclass(frozen=True, slots=True)
class DeviceTree:
    """N nodes, the root first; parents precede children.

    parent_N (root -1), depth_N (root 0), rank_N (rank in its head's list; -1 for the root and lookup nodes): int64.
    ancestor_mask_NN: bool, self included.
    ancestor_bits_N: the same as bits, node j at bit j of an int64 (bit 63 is its sign); empty for a chain of more than 64.
    inner_levels: the nodes with children that heads fill, a level at a time from the root on: (parent_n, rank_n), int64, the place
        of each one's parent within the level above and its rank; zeros for the root. inner_list_N: the place of each node's parent
        among all of them; -1 for the root and lookup nodes.
    max_depth, head_depth, lookup_depth, max_rank: as in TreeTopology.
    """

    parent_N: Tensor
    depth_N: Tensor
    rank_N: Tensor
    ancestor_mask_NN: Tensor
    ancestor_bits_N: Tensor
    inner_list_N: Tensor
    inner_levels: tuple[tuple[Tensor, Tensor], ...]
    max_depth: int
    head_depth: int
    lookup_depth: int
    max_rank: int

    @property
    def num_nodes(self) -> int:
        return self.parent_N.shape[0]

    @classmethod
    def create(cls, topology: TreeTopology, device: torch.device) -> DeviceTree:
        bits = topology.ancestor_mask
        mask = [[bool(bits[i] >> j & 1) for j in range(topology.num_nodes)] for i in range(topology.num_nodes)]
        signed_bits = [word - 2**64 if word >= 2**63 else word for word in bits]
        inner_list, levels = _inner_nodes(topology)
        return cls(
            parent_N=torch.tensor(topology.parents, dtype=torch.int64, device=device),
            depth_N=torch.tensor(topology.depths, dtype=torch.int64, device=device),
            rank_N=torch.tensor(topology.ranks, dtype=torch.int64, device=device),
            ancestor_mask_NN=torch.tensor(mask, dtype=torch.bool, device=device),
            ancestor_bits_N=torch.tensor(signed_bits, dtype=torch.int64, device=device),
            inner_list_N=torch.tensor(inner_list, dtype=torch.int64, device=device),
            inner_levels=tuple(
                (torch.tensor(parents, dtype=torch.int64, device=device), torch.tensor(ranks, dtype=torch.int64, device=device))
                for parents, ranks in levels
            ),
            max_depth=topology.max_depth,
            head_depth=topology.head_depth,
            lookup_depth=topology.lookup_depth,
            max_rank=topology.max_rank,
        )

    @classmethod
    def causal(cls, num_tokens: int, device: torch.device) -> DeviceTree:
        """A chain of `num_tokens` nodes: how known tokens in a row (a prompt chunk) look to attention."""
        index = torch.arange(num_tokens, device=device)
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
        no_bits = torch.zeros(0, dtype=torch.int64, device=device)
        # nobody drafts a chain of known tokens
        return cls(index - 1, index, torch.zeros_like(index), mask, no_bits, index - 1, (), num_tokens - 1, 0, 0, -1)


def _inner_nodes(topology: TreeTopology) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """`inner_list_N` and `inner_levels`."""
    parent_of = {node: topology.parents[node] for node, choice in enumerate(topology.choices, start=1) if not is_lookup(choice)}
    by_depth: list[list[int]] = [[] for _ in range(topology.head_depth)]
    for node in sorted(set(parent_of.values())):
        by_depth[topology.depths[node]].append(node)
    place = {node: number for number, node in enumerate(node for nodes in by_depth for node in nodes)}
    levels = [([0], [0])] if by_depth else []
    for above, nodes in itertools.pairwise(by_depth):
        levels.append(([above.index(parent_of[node]) for node in nodes], [topology.ranks[node] for node in nodes]))
    return [place[parent_of[node]] if node in parent_of else -1 for node in range(topology.num_nodes)], levels
