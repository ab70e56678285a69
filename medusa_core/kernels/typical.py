"""Typical acceptance of drafts over the nodes of trees, in place.

The reference is `medusa_core.speculation.typical.force_typical`.

Shapes: B lanes of the step · N tree nodes · T = B * N packed rows · P lanes of the runner · W stop ids · V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

_PART_LEN = 8192


@triton.jit
def _measure_kernel(
    logits,
    lane_ptr,
    index_ptr,
    parent_ptr,
    temperature_ptr,
    epsilon_ptr,
    delta_ptr,
    min_tokens_ptr,
    stop_ids,
    out_norm,
    out_least,
    num_columns,
    row_stride,
    NUM_NODES: tl.constexpr,
    NODES_PADDED: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    PART: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Logarithm of a row's sum of exponentials, and the log-probability that its children must exceed. Grid (T,)."""
    follow_on(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.load(lane_ptr + row)
    epsilon = tl.load(epsilon_ptr + lane)
    node = tl.arange(0, NODES_PADDED)
    parents = tl.load(parent_ptr + node, mask=node < NUM_NODES, other=-1)
    num_children = tl.sum((parents == row % NUM_NODES).to(tl.int32))
    if (epsilon > 0) & (num_children > 0):
        temperature = tl.load(temperature_ptr + lane)
        is_early = tl.load(index_ptr + row) < tl.load(min_tokens_ptr + lane)
        highest = tl.full([], float("-inf"), tl.float32)
        mass = tl.full([], 0.0, tl.float32)
        # of exponentials times scaled logits
        moment = tl.full([], 0.0, tl.float32)
        for start in range(0, num_columns, PART):
            columns = start + tl.arange(0, PART)
            value = tl.load(logits + row * row_stride + columns, mask=columns < num_columns, other=float("-inf"))
            value = tl.where(value == value, value, float("-inf")) / temperature
            if is_early:
                for number in range(NUM_STOP_IDS):
                    value = tl.where(columns == tl.load(stop_ids + lane * NUM_STOP_IDS + number), float("-inf"), value)
            part_highest = tl.max(value)
            if part_highest > highest:
                factor = tl.exp(highest - part_highest)
                mass *= factor
                moment *= factor
                highest = part_highest
            weight = tl.where(value > float("-inf"), tl.exp(value - highest), 0.0)
            mass += tl.sum(weight)
            moment += tl.sum(tl.where(weight > 0, weight * value, 0.0))
        norm = highest + tl.log(mass)
        entropy = norm - moment / mass
        tl.store(out_norm + row, norm)
        tl.store(out_least + row, tl.minimum(tl.log(epsilon), tl.log(tl.load(delta_ptr + lane)) - entropy))


@triton.jit
def _take_path_kernel(
    drawn,
    logits,
    lane_ptr,
    token_ptr,
    index_ptr,
    parent_ptr,
    depth_ptr,
    temperature_ptr,
    epsilon_ptr,
    min_tokens_ptr,
    stop_ids,
    norm_ptr,
    least_ptr,
    row_stride,
    max_depth,
    NUM_NODES: tl.constexpr,
    NODES_PADDED: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One lane. Grid (B,)."""
    follow_on(USE_PDL)
    first = tl.program_id(0).to(tl.int64) * NUM_NODES
    lane = tl.load(lane_ptr + first)
    if tl.load(epsilon_ptr + lane) > 0:
        node = tl.arange(0, NODES_PADDED)
        is_node = node < NUM_NODES
        parent = tl.load(parent_ptr + node, mask=is_node, other=-1)
        is_draft = is_node & (parent >= 0)
        above = first + tl.maximum(parent, 0)
        token = tl.load(token_ptr + first + node, mask=is_draft, other=-1)
        # no token is -1: a node that was taken out of the tree
        is_draft = is_draft & (token >= 0)
        logit = tl.load(logits + above * row_stride + tl.maximum(token, 0), mask=is_draft, other=float("-inf"))
        logprob = logit / tl.load(temperature_ptr + lane) - tl.load(norm_ptr + above, mask=is_draft, other=0.0)
        is_accepted = is_draft & (logprob > tl.load(least_ptr + above, mask=is_draft, other=0.0))
        is_early = tl.load(index_ptr + above, mask=is_draft, other=0) < tl.load(min_tokens_ptr + lane)
        for number in range(NUM_STOP_IDS):
            is_stop = token == tl.load(stop_ids + lane * NUM_STOP_IDS + number)
            is_accepted = is_accepted & ~(is_stop & is_early)
        # nodes whose whole path is accepted, as bits
        bit = tl.full([NODES_PADDED], 1, tl.int64) << node
        reached = tl.full([], 1, tl.int64)
        for _ in range(max_depth):
            is_reached = is_accepted & (((reached >> tl.maximum(parent, 0)) & 1) > 0)
            reached = tl.sum(tl.where(is_reached, bit, 0)) | 1
        depth = tl.load(depth_ptr + node, mask=is_node, other=0)
        is_reached = is_accepted & (((reached >> node) & 1) > 0)
        # the deepest, and the first of these
        best = tl.max(tl.where(is_reached, depth * NODES_PADDED + NODES_PADDED - 1 - node, 0))
        current = tl.where(best >= NODES_PADDED, NODES_PADDED - 1 - best % NODES_PADDED, 0)
        # its tokens by depth, from the bottom up
        path_N = tl.zeros([NODES_PADDED], tl.int64)
        length = best // NODES_PADDED
        while current > 0:
            path_N = tl.where(node == tl.load(depth_ptr + current), tl.load(token_ptr + first + current), path_N)
            current = tl.load(parent_ptr + current)
        # From the top down, the first of the nodes whose path holds the same tokens stands for all (kernels/tree_step.py).
        visited = tl.full([], 1, tl.int64)
        for level in range(1, length + 1):
            path_token = tl.sum(tl.where(node == level, path_N, 0))
            is_visited = is_node & (((visited >> node) & 1) > 0)
            tl.store(drawn + first + tl.min(tl.where(is_visited, node, NODES_PADDED)), path_token)
            is_child = is_node & (parent >= 0) & (((visited >> tl.maximum(parent, 0)) & 1) > 0) & (token == path_token)
            visited = tl.sum(tl.where(is_child, bit, 0))


def take_typical_paths(
    drawn_T: Tensor,
    logits_TV: Tensor,
    *,
    lane_T: Tensor,
    token_T: Tensor,
    index_T: Tensor,
    parent_N: Tensor,
    depth_N: Tensor,
    max_depth: int,
    temperature_P: Tensor,
    epsilon_P: Tensor,
    delta_P: Tensor,
    min_tokens_P: Tensor,
    stop_ids_PW: Tensor,
    use_pdl: bool = False,
) -> None:
    """Replace draws along the longest path of accepted drafts by its tokens, in the lanes that ask for it.

    Args:
        drawn_T: int64, what was drawn at each row; changed in place.
        logits_TV: float32, contiguous along V, as drawn from: penalties, biases and masks applied.
        lane_T, token_T (-1 for a node that is not to be reached), index_T, parent_N (root -1), depth_N: int64.
        epsilon_P (0 = off, as for greedy lanes), delta_P, temperature_P: float32. min_tokens_P, stop_ids_PW (-1 = none): int64.
    """
    num_rows, num_columns = logits_TV.shape
    num_nodes = parent_N.shape[0]
    if num_rows == 0 or num_nodes == 1:
        return
    norm_T, least_T = torch.empty(2, num_rows, dtype=torch.float32, device=logits_TV.device)
    nodes_padded = triton.next_power_of_2(num_nodes)
    _measure_kernel[(num_rows,)](
        logits_TV,
        lane_T,
        index_T,
        parent_N,
        temperature_P,
        epsilon_P,
        delta_P,
        min_tokens_P,
        stop_ids_PW,
        norm_T,
        least_T,
        num_columns,
        logits_TV.stride(0),
        NUM_NODES=num_nodes,
        NODES_PADDED=nodes_padded,
        NUM_STOP_IDS=stop_ids_PW.shape[1],
        PART=_PART_LEN,
        USE_PDL=use_pdl,
        num_warps=16,
        **launch_options(use_pdl),
    )
    _take_path_kernel[(num_rows // num_nodes,)](
        drawn_T,
        logits_TV,
        lane_T,
        token_T,
        index_T,
        parent_N,
        depth_N,
        temperature_P,
        epsilon_P,
        min_tokens_P,
        stop_ids_PW,
        norm_T,
        least_T,
        logits_TV.stride(0),
        max_depth,
        NUM_NODES=num_nodes,
        NODES_PADDED=nodes_padded,
        NUM_STOP_IDS=stop_ids_PW.shape[1],
        USE_PDL=use_pdl,
        num_warps=1,
        **launch_options(use_pdl),
    )
