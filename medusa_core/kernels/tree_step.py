"""The two ends of a decode step over lane state: what the model is given, and what becomes of its draws.

`pack_trees` lays out each lane's tree as packed rows. `walk_trees` follows the tokens drawn down the tree, cuts the path at stop
ids and limits, and writes it to the lane. References: runtime/runner.py and speculation/verify.py, which do the same in torch.

Shapes: B lanes of the step · N nodes · T = B * N packed rows · P lanes of the runner · L levels (max depth + 1) · W stop ids ·
X block-table width · E hidden · R lists of candidates · C candidates per list · J keys of matches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

# Columns of a result row behind its L tokens: how many were drawn (accepted + 1), how many kept, the finish code, and the nodes
# credited with what was kept, as bits.
NUM_RESULT_COLUMNS = 4
# as in speculation/verify.py
_STOP, _LENGTH = tl.constexpr(1), tl.constexpr(2)
_HIDDEN_BLOCK = 1024


@triton.jit
def _slot(block_table, lane, column, block_size: tl.constexpr, table_width, spare_slot, mask):
    """Slot of position `column` of a lane; the spare slot where its table has no block."""
    block_idx = column // block_size
    block = tl.load(block_table + lane * table_width + block_idx, mask=mask & (block_idx < table_width), other=-1)
    return tl.where(block < 0, spare_slot, block * block_size + column % block_size)


@triton.jit
def _pack_kernel(
    lane_ptr,
    candidates,
    match_key,
    list_ptr,
    depth_ptr,
    rank_ptr,
    num_known,
    num_prompt,
    tokens,
    tokens_stride,
    block_table,
    table_width,
    spare_slot,
    max_position,
    first_prediction,
    candidates_lane_stride,
    candidates_list_stride,
    out_token,
    out_position,
    out_slot,
    out_index,
    out_lane,
    out_base,
    num_nodes: tl.constexpr,
    nodes_padded: tl.constexpr,
    block_size: tl.constexpr,
    has_draft: tl.constexpr,
    num_keys: tl.constexpr,
    keys_padded: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    follow_on(USE_PDL)
    b = tl.program_id(0)
    lane = tl.load(lane_ptr + b)
    known = tl.load(num_known + lane)
    base = known - 1
    node = tl.arange(0, nodes_padded)
    is_node = node < num_nodes
    depth = tl.load(depth_ptr + node, mask=is_node, other=0)
    rank = tl.load(rank_ptr + node, mask=is_node, other=-1)
    # the root's token; for lookup nodes, where something matches, the one so far behind the match, over and over up to the root
    column = base + node * 0
    if num_keys > 0:
        key_idx = tl.arange(0, keys_padded)
        key = tl.max(tl.load(match_key + b * num_keys + key_idx, mask=key_idx < num_keys, other=0))
        place = key & 0xFFFFFFFF
        suggested = place + 1 + (depth - 1) % tl.maximum(base - place, 1)
        # predicted tokens go on, and are padded for as long as a chain may be
        suggested = tl.where(place >= first_prediction, place + depth, suggested)
        column = tl.where((rank < 0) & (depth > 0) & (key > 0), suggested, column)
    token = tl.load(tokens + lane * tokens_stride + column)
    if has_draft:
        is_draft = rank >= 0
        list_idx = tl.load(list_ptr + node, mask=is_draft, other=0)
        list_ptr_N = candidates + b * candidates_lane_stride + list_idx * candidates_list_stride
        token = tl.where(is_draft, tl.load(list_ptr_N + rank, mask=is_draft, other=0), token)
    row = b * num_nodes + node
    tl.store(out_token + row, token, mask=is_node)
    tl.store(out_position + row, tl.minimum(base + depth, max_position), mask=is_node)
    tl.store(out_slot + row, _slot(block_table, lane, base + node, block_size, table_width, spare_slot, is_node), mask=is_node)
    tl.store(out_index + row, known - tl.load(num_prompt + lane) + depth, mask=is_node)
    tl.store(out_lane + row, lane + node * 0, mask=is_node)
    tl.store(out_base + b, base)


@triton.jit
def _walk_kernel(
    lane_ptr,
    drawn_ptr,
    token_ptr,
    parent_ptr,
    rank_ptr,
    num_known,
    max_total,
    is_finished,
    stop_ids,
    tokens,
    tokens_stride,
    block_table,
    table_width,
    spare_slot,
    hidden,
    lane_hidden,
    has_logprobs,
    path_hidden,
    path_levels,
    count,
    vocab_size,
    result,
    source,
    target,
    num_nodes: tl.constexpr,
    nodes_padded: tl.constexpr,
    num_levels: tl.constexpr,
    levels_padded: tl.constexpr,
    num_stop_ids: tl.constexpr,
    stop_ids_padded: tl.constexpr,
    hidden_size: tl.constexpr,
    hidden_block: tl.constexpr,
    block_size: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    follow_on(USE_PDL)
    b = tl.program_id(0)
    lane = tl.load(lane_ptr + b)
    known = tl.load(num_known + lane)
    room = tl.load(max_total + lane) - known
    finished = tl.load(is_finished + lane)
    node = tl.arange(0, nodes_padded)
    is_node = node < num_nodes
    drawn = tl.load(drawn_ptr + b * num_nodes + node, mask=is_node, other=-1)
    token = tl.load(token_ptr + b * num_nodes + node, mask=is_node, other=-2)
    parent = tl.load(parent_ptr + node, mask=is_node, other=-2)
    stop_idx = tl.arange(0, stop_ids_padded)
    stops = tl.load(stop_ids + lane * num_stop_ids + stop_idx, mask=stop_idx < num_stop_ids, other=-1)

    # The walk alone; int64 throughout, as a loop must not change a type. `visited` has a bit for each node whose path holds the
    # tokens drawn so far; the draw is that of the first.
    level_L = tl.arange(0, levels_padded)
    x_L = tl.full([levels_padded], -1, tl.int64)
    node_L = tl.zeros([levels_padded], tl.int64)
    credit_L = tl.zeros([levels_padded], tl.int64)
    bit = tl.full([nodes_padded], 1, tl.int64) << node
    of_heads = tl.sum(tl.where(tl.load(rank_ptr + node, mask=is_node, other=-1) >= 0, bit, 0))
    visited = known * 0 + 1
    current = known * 0
    length = known * 0
    while (visited != 0) & (length < num_levels):
        x = tl.sum(tl.where(node == current, drawn, 0))
        x_L = tl.where(level_L == length, x, x_L)
        node_L = tl.where(level_L == length, current, node_L)
        length += 1
        is_visited = (((visited >> tl.maximum(parent, 0)) & 1) > 0) & (parent >= 0) & (token == x)
        visited = tl.sum(tl.where(is_visited, bit, 0))
        # The token is a head's if any of these nodes is, else the lookup's: the lowest bit of those. No bit where no node holds it.
        credited = tl.where((visited & of_heads) != 0, visited & of_heads, visited)
        credit_L = tl.where(level_L == length - 1, credited & (0 - credited), credit_L)
        current = tl.min(tl.where(is_visited, node, nodes_padded)).to(tl.int64)

    # the cut: as cut_walk
    is_stop_LW = (x_L[:, None] == stops[None, :]) & (stops >= 0)[None, :]
    is_stop_L = tl.max(is_stop_LW.to(tl.int32), axis=1) > 0
    stop_len = tl.min(tl.where(is_stop_L & (level_L < length), level_L + 1, levels_padded + 1)).to(tl.int64)
    kept = tl.minimum(tl.minimum(length, stop_len), room)
    code = tl.where(kept >= room, _LENGTH, 0)
    code = tl.where(stop_len <= kept, _STOP, code)
    kept = tl.where(finished > 0, 0, kept)
    code = tl.where(finished > 0, 0, code)

    out = result + b * (num_levels + 4)
    is_level = level_L < num_levels
    is_kept_L = level_L < kept
    tl.store(out + level_L, x_L, mask=is_level)
    tl.store(out + num_levels, length)
    tl.store(out + num_levels + 1, kept)
    tl.store(out + num_levels + 2, code)
    tl.store(out + num_levels + 3, tl.sum(tl.where(is_kept_L, credit_L, 0)))
    tl.store(tokens + lane * tokens_stride + known + level_L, x_L, mask=is_kept_L)
    # a path may hold a token more than once
    tl.atomic_add(count + lane * vocab_size + x_L, 1, mask=is_kept_L)
    # The K/V of an accepted node moves from its place in the tree to its place in the path.
    has_move = is_kept_L & (node_L != level_L)
    source_slot = _slot(block_table, lane, known - 1 + node_L, block_size, table_width, spare_slot, has_move)
    target_slot = _slot(block_table, lane, known - 1 + level_L, block_size, table_width, spare_slot, has_move)
    tl.store(source + b * num_levels + level_L, tl.where(has_move, source_slot, -1), mask=is_level)
    tl.store(target + b * num_levels + level_L, tl.where(has_move, target_slot, -1), mask=is_level)
    tl.store(num_known + lane, known + kept)
    tl.store(is_finished + lane, tl.where(code > 0, 1, finished))
    if tl.load(has_logprobs + lane) > 0:
        level = known * 0
        while level < kept:
            row = b * num_nodes + tl.sum(tl.where(level_L == level, node_L, 0))
            path_row = lane * path_levels + level
            for start in range(0, hidden_size, hidden_block):
                column = start + tl.arange(0, hidden_block)
                values = tl.load(hidden + row * hidden_size + column, mask=column < hidden_size)
                tl.store(path_hidden + path_row * hidden_size + column, values, mask=column < hidden_size)
            level += 1
    if kept > 0:
        row = b * num_nodes + tl.sum(tl.where(level_L == kept - 1, node_L, 0))
        for start in range(0, hidden_size, hidden_block):
            column = start + tl.arange(0, hidden_block)
            values = tl.load(hidden + row * hidden_size + column, mask=column < hidden_size)
            tl.store(lane_hidden + lane * hidden_size + column, values, mask=column < hidden_size)


def pack_trees(
    lane_B: Tensor,
    candidates_BRC: Tensor | None,
    match_BJ: Tensor | None = None,
    *,
    list_N: Tensor,
    depth_N: Tensor,
    rank_N: Tensor,
    num_known_P: Tensor,
    num_prompt_P: Tensor,
    tokens_PL: Tensor,
    block_table_PX: Tensor,
    block_size: int,
    spare_slot: int,
    max_position: int,
    first_prediction: int,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of one decode step, from lane state. All tensors int64 and contiguous, but for the candidates.

    Args:
        candidates_BRC: lists of tokens, best first, each contiguous; node n is number rank_N[n] of list list_N[n]. None only for a
            tree without such nodes.
        match_BJ: keys of kernels/lookup.py, contiguous, for the draft nodes of rank -1: one of depth d holds the token d behind the
            match, or the root's where nothing matches. Without keys, the root's.
        first_prediction: column of tokens_PL at which predicted tokens begin.
        max_position: positions are cut there: a tree may reach beyond the context, where nothing is ever kept.
        use_pdl: launch while the kernel before still runs (programmatic dependent launch, sm_90 and later). Attention reads some
            of the results ahead, so a kernel without must come in between; the embedding is one.

    Returns:
        token_T, position_T, slot_T (where K/V go; the spare slot beyond a lane's blocks), index_T (index in the output of the token
        drawn at the row), lane_T, base_B (committed tokens: the root's position).
    """
    num_lanes, num_nodes = lane_B.shape[0], depth_N.shape[0]
    num_keys = 0 if match_BJ is None else match_BJ.shape[1]
    if candidates_BRC is None and num_keys == 0 and num_nodes > 1:
        raise ValueError("a tree of more than one node needs candidates or matches")
    if candidates_BRC is not None and candidates_BRC.stride(2) != 1:
        candidates_BRC = candidates_BRC.contiguous()
    token_T, position_T, slot_T, index_T, lane_T = lane_B.new_empty(5, num_lanes * num_nodes)
    base_B = torch.empty_like(lane_B)
    _pack_kernel[(num_lanes,)](
        lane_B,
        candidates_BRC,
        match_BJ,
        list_N,
        depth_N,
        rank_N,
        num_known_P,
        num_prompt_P,
        tokens_PL,
        tokens_PL.stride(0),
        block_table_PX,
        block_table_PX.shape[1],
        spare_slot,
        max_position,
        first_prediction,
        0 if candidates_BRC is None else candidates_BRC.stride(0),
        0 if candidates_BRC is None else candidates_BRC.stride(1),
        token_T,
        position_T,
        slot_T,
        index_T,
        lane_T,
        base_B,
        num_nodes=num_nodes,
        nodes_padded=triton.next_power_of_2(num_nodes),
        block_size=block_size,
        has_draft=candidates_BRC is not None,
        num_keys=num_keys,
        keys_padded=triton.next_power_of_2(max(num_keys, 1)),
        USE_PDL=use_pdl,
        num_warps=1,
        **launch_options(use_pdl),
    )
    return token_T, position_T, slot_T, index_T, lane_T, base_B


def walk_trees(
    lane_B: Tensor,
    drawn_T: Tensor,
    token_T: Tensor,
    hidden_TE: Tensor,
    *,
    parent_N: Tensor,
    rank_N: Tensor,
    num_levels: int,
    num_known_P: Tensor,
    max_total_P: Tensor,
    is_finished_P: Tensor,
    stop_ids_PW: Tensor,
    tokens_PL: Tensor,
    hidden_PE: Tensor,
    has_logprobs_P: Tensor,
    path_hidden_PLE: Tensor,
    count_PV: Tensor,
    block_table_PX: Tensor,
    block_size: int,
    spare_slot: int,
    result_BR: Tensor,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Walk each lane's tree along `drawn_T`, the token the model drew at every node, and update the lane.

    Writes tokens_PL, num_known_P, is_finished_P, hidden_PE (the hidden state the last kept token was drawn from), path_hidden_PLE
    (those of all kept tokens, where has_logprobs_P, int64, is 1; as many levels as any walk has, or more) and count_PV (how often
    each token was kept, int32) of the lanes in lane_B, and `result_BR` int64 [B, L + 4]: the tokens drawn along the path (-1
    beyond its end), then how many were drawn, how many kept, the finish code of speculation/verify.py, and its `credited_nodes`.
    A lane that had finished keeps nothing.

    Returns:
        source_BL, target_BL int64: slots whose K/V must move, -1 where nothing moves.
    """
    num_lanes, num_nodes = lane_B.shape[0], parent_N.shape[0]
    hidden_size = hidden_TE.shape[1]
    source_BL, target_BL = lane_B.new_empty(2, num_lanes, num_levels)
    _walk_kernel[(num_lanes,)](
        lane_B,
        drawn_T,
        token_T,
        parent_N,
        rank_N,
        num_known_P,
        max_total_P,
        is_finished_P,
        stop_ids_PW,
        tokens_PL,
        tokens_PL.stride(0),
        block_table_PX,
        block_table_PX.shape[1],
        spare_slot,
        hidden_TE,
        hidden_PE,
        has_logprobs_P,
        path_hidden_PLE,
        path_hidden_PLE.shape[1],
        count_PV,
        count_PV.shape[1],
        result_BR,
        source_BL,
        target_BL,
        num_nodes=num_nodes,
        nodes_padded=triton.next_power_of_2(num_nodes),
        num_levels=num_levels,
        levels_padded=triton.next_power_of_2(num_levels),
        num_stop_ids=stop_ids_PW.shape[1],
        stop_ids_padded=triton.next_power_of_2(stop_ids_PW.shape[1]),
        hidden_size=hidden_size,
        hidden_block=min(triton.next_power_of_2(hidden_size), _HIDDEN_BLOCK),
        block_size=block_size,
        USE_PDL=use_pdl,
        num_warps=1 if num_nodes <= 32 else 2,
        **launch_options(use_pdl),
    )
    return source_BL, target_BL
