"""Fills a tree with the heads' most likely tokens and with what the text suggests.

A drafter offers *lists* of candidates, and each node takes the one of its rank from one of them. Independent heads have one each,
for all nodes of a depth; where candidates depend on the path, there is one for every node with children. Lookup nodes take theirs
from the text (speculation/lookup.py), and no drafter sees them.

Shapes: B lanes · N tree nodes · R lists · C candidates per list · m, n nodes with children on one level and the next · E hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from medusa_core.model.heads import DraftHeads, MedusaHeads
from medusa_core.model.loader import LoadedModel
from medusa_core.model.sequential_heads import SequentialHeads
from medusa_core.speculation.device_tree import DeviceTree


class Drafter(Protocol):
    """What fills trees."""

    def lists_of(self, tree: DeviceTree) -> Tensor:
        """Which list each node takes its token from, int64 [N]; any number for the root and lookup nodes."""

    def __call__(self, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree) -> Tensor:
        """Lists of base vocabulary ids, best first, int64 [B, R, C], for a tree that asks for some.

        hidden_BE: post-norm hidden state at the position before the root. root_B: the root's token.
        """


class IndependentDrafter:
    """A list per head: head k (0-based) predicts token t+2+k from the hidden state at t, where t+1 is the root's index; so a node
    of depth d takes its token from head d-1."""

    def __init__(self, heads: MedusaHeads, loaded: LoadedModel) -> None:
        self._topk = partial(heads.topk, project=loaded.project)

    def lists_of(self, tree: DeviceTree) -> Tensor:
        return tree.depth_N - 1

    def __call__(self, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree) -> Tensor:
        return self._topk(hidden_BE, tree.head_depth, tree.max_rank + 1)


class SequentialDrafter:
    """A list per node with children, level by level."""

    def __init__(self, heads: SequentialHeads, loaded: LoadedModel) -> None:
        self._step = partial(heads.step, project=loaded.project, embed=loaded.model.get_input_embeddings())

    def lists_of(self, tree: DeviceTree) -> Tensor:
        return tree.inner_list_N

    def __call__(self, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree) -> Tensor:
        state_mBE, lists_mBC = hidden_BE.unsqueeze(0), root_B.view(1, -1, 1)
        lists = []
        for head, (parent_n, rank_n) in enumerate(tree.inner_levels):
            state_mBE, lists_mBC = self._step(head, state_mBE, lists_mBC, parent_n, rank_n, tree.max_rank + 1)
            lists.append(lists_mBC)
        return torch.cat(lists).transpose(0, 1)


def make_drafter(heads: DraftHeads, loaded: LoadedModel, *, has_kernels: bool = False) -> Drafter:
    """The drafter for heads on their base model. has_kernels: whether kernels run on the model's device."""
    if not isinstance(heads, SequentialHeads):
        return IndependentDrafter(heads, loaded)
    if has_kernels:
        # Imported here: without a GPU there may be no triton.
        from medusa_core.speculation.kernel_drafter import KernelDrafter, suits

        if suits(heads, loaded):
            return KernelDrafter(heads, loaded)
    return SequentialDrafter(heads, loaded)


def draft_tree(
    drafter: Drafter | None, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree, lookup_BD: Tensor | None = None
) -> Tensor:
    """Token of every node, int64 [B, N]. See `Drafter` for the arguments.

    drafter: None only for a tree without nodes of heads. lookup_BD: the text's tokens, one for each node of the lookup chain.
    """
    tokens_BN = root_B.unsqueeze(1).repeat(1, tree.num_nodes)
    if tree.head_depth > 0:
        assert drafter is not None
        lists_BRC = drafter(hidden_BE, root_B, tree)
        is_drafted_N = tree.rank_N >= 0
        drafted_BN = lists_BRC[:, torch.where(is_drafted_N, drafter.lists_of(tree), 0), tree.rank_N]
        tokens_BN = torch.where(is_drafted_N, drafted_BN, tokens_BN)
    if lookup_BD is not None:
        is_lookup_N = (tree.rank_N < 0) & (tree.depth_N > 0)
        tokens_BN = torch.where(is_lookup_N, lookup_BD[:, (tree.depth_N - 1).clamp(0, tree.lookup_depth - 1)], tokens_BN)
    return tokens_BN
