"""Fills a tree with the heads' most likely tokens.

Shapes: B lanes · N tree nodes · K heads · C candidates per head · E hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medusa_core.speculation.device_tree import DeviceTree

# (hidden_BE, K, C) -> the C most likely tokens of each of the first K heads, best first: base vocabulary ids, int64 [B, K, C]
Draft = Callable[[Tensor, int, int], Tensor]


def draft_tree(draft: Draft, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree) -> Tensor:
    """Token of every node, int64 [B, N].

    Head k (0-based) predicts token t+2+k from the hidden state at t, where t+1 is the root's index; so a node of depth d takes
    its token from head d-1.

    Args:
        hidden_BE: post-norm hidden state at the position before the root.
        root_B: the root's token.
    """
    if tree.num_nodes == 1:
        return root_B.unsqueeze(1)
    candidates_BKC = draft(hidden_BE, tree.max_depth, tree.max_rank + 1)
    drafted_Bn = candidates_BKC[:, tree.depth_N[1:] - 1, tree.rank_N[1:]]
    return torch.cat([root_B.unsqueeze(1), drafted_Bn], dim=1)
