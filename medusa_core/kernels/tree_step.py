"""The two ends of a decode step over lane state: what the model is given, and what becomes of its draws.

`gather_roots` reads what heads draft from, `pack_trees` lays out each lane's tree as packed rows. `walk_trees` follows the tokens
drawn down the tree, cuts the path at stop ids and limits, and writes it to the lane. References: runtime/runner.py and
speculation/verify.py, which do the same in torch.

Shapes: B lanes of the step · N nodes · T = B * N packed rows · P lanes of the runner · L levels (max depth + 1) · W stop ids ·
X block-table width · E hidden · R lists of candidates · C candidates per list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

# Columns of a result row behind its L tokens: how many were drawn (accepted + 1), how many kept, and the finish code.
NUM_RESULT_COLUMNS = 3
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
    token = tl.load(tokens + lane * tokens_stride + base + node * 0)
    if has_draft:
        is_draft = is_node & (node > 0)
        list_idx = tl.load(list_ptr + node, mask=is_draft, other=0)
        rank = tl.load(rank_ptr + node, mask=is_draft, other=0)
        list_ptr_N = candidates + b * candidates_lane_stride + list_idx * candidates_list_stride
        drafted = tl.load(list_ptr_N + rank, mask=is_draft, other=0)
        token = tl.where(node == 0, token, drafted)
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

    out = result + b * (num_levels + 3)
    # scalars of the walk; int64 throughout, as a loop must not change their type
    current = known * 0
    is_open = current + 1
    is_kept = tl.where(finished > 0, current, is_open)
    length = known * 0
    kept = known * 0
    code = known * 0
    last_node = known * 0
    has_path = tl.load(has_logprobs + lane)
    for level in range(num_levels):
        x = tl.sum(tl.where(node == current, drawn, 0))
        tl.store(out + level, tl.where(is_open > 0, x, -1))
        length += is_open
        keeps = is_open * is_kept * (level < room).to(tl.int64)
        tl.store(tokens + lane * tokens_stride + known + level, x, mask=keeps > 0)
        # a path may hold a token more than once
        tl.atomic_add(count + lane * vocab_size + x, 1, mask=keeps > 0)
        # The K/V of an accepted node moves from its place in the tree to its place in the path.
        has_move = (keeps > 0) & (current != level)
        source_slot = _slot(block_table, lane, known - 1 + current, block_size, table_width, spare_slot, has_move)
        target_slot = _slot(block_table, lane, known - 1 + level, block_size, table_width, spare_slot, has_move)
        tl.store(source + b * num_levels + level, tl.where(has_move, source_slot, -1))
        tl.store(target + b * num_levels + level, tl.where(has_move, target_slot, -1))
        if keeps * has_path > 0:
            for start in range(0, hidden_size, hidden_block):
                column = start + tl.arange(0, hidden_block)
                values = tl.load(hidden + (b * num_nodes + current) * hidden_size + column, mask=column < hidden_size)
                path_row = lane * path_levels + level
                tl.store(path_hidden + path_row * hidden_size + column, values, mask=column < hidden_size)
        kept += keeps
        last_node = tl.where(keeps > 0, current, last_node)
        is_stop = tl.max(((stops == x) & (stops >= 0)).to(tl.int64))
        code = tl.where((keeps > 0) & (is_stop > 0), _STOP, code)
        is_kept = is_kept * (1 - is_stop * keeps)
        child = tl.min(tl.where((parent == current) & (token == x) & is_node, node, nodes_padded))
        is_open = is_open * (child < num_nodes).to(tl.int64)
        current = tl.where(is_open > 0, child.to(tl.int64), 0)
    code = tl.where((code == 0) & (kept >= room) & (finished == 0), _LENGTH, code)
    tl.store(out + num_levels, length)
    tl.store(out + num_levels + 1, kept)
    tl.store(out + num_levels + 2, code)
    tl.store(num_known + lane, known + kept)
    tl.store(is_finished + lane, tl.where(code > 0, 1, finished))
    if kept > 0:
        row = b * num_nodes + last_node
        for start in range(0, hidden_size, hidden_block):
            column = start + tl.arange(0, hidden_block)
            values = tl.load(hidden + row * hidden_size + column, mask=column < hidden_size)
            tl.store(lane_hidden + lane * hidden_size + column, values, mask=column < hidden_size)


@triton.jit
def _roots_kernel(
    lane_ptr,
    num_known,
    tokens,
    tokens_stride,
    lane_hidden,
    out_hidden,
    out_root,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One lane. Grid (B,)."""
    follow_on(USE_PDL)
    b = tl.program_id(0).to(tl.int64)
    lane = tl.load(lane_ptr + b)
    e_E = tl.arange(0, BLOCK_E)
    hidden_E = tl.load(lane_hidden + lane * E + e_E, mask=e_E < E)
    tl.store(out_hidden + b * E + e_E, hidden_E, mask=e_E < E)
    tl.store(out_root + b, tl.load(tokens + lane * tokens_stride + tl.load(num_known + lane) - 1))


def gather_roots(
    lane_B: Tensor, *, num_known_P: Tensor, tokens_PL: Tensor, hidden_PE: Tensor, use_pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """What is drafted from, of the lanes in lane_B: the hidden states [B, E], and the roots' tokens, int64 [B]."""
    num_lanes, hidden_size = lane_B.shape[0], hidden_PE.shape[1]
    hidden_BE = hidden_PE.new_empty(num_lanes, hidden_size)
    root_B = torch.empty_like(lane_B)
    _roots_kernel[(num_lanes,)](
        lane_B,
        num_known_P,
        tokens_PL,
        tokens_PL.stride(0),
        hidden_PE,
        hidden_BE,
        root_B,
        E=hidden_size,
        BLOCK_E=triton.next_power_of_2(hidden_size),
        USE_PDL=use_pdl,
        **launch_options(use_pdl),
    )
    return hidden_BE, root_B


def pack_trees(
    lane_B: Tensor,
    candidates_BRC: Tensor | None,
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
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of one decode step, from lane state. All tensors int64 and contiguous, but for the candidates.

    Args:
        candidates_BRC: lists of tokens, best first, each contiguous; node n is number rank_N[n] of list list_N[n]. None only for a
            tree of one node.
        max_position: positions are cut there: a tree may reach beyond the context, where nothing is ever kept.
        use_pdl: launch while the kernel before still runs (programmatic dependent launch, sm_90 and later). Attention reads some
            of the results ahead, so a kernel without must come in between; the embedding is one.

    Returns:
        token_T, position_T, slot_T (where K/V go; the spare slot beyond a lane's blocks), index_T (index in the output of the token
        drawn at the row), lane_T, base_B (committed tokens: the root's position).
    """
    num_lanes, num_nodes = lane_B.shape[0], depth_N.shape[0]
    if candidates_BRC is None and num_nodes > 1:
        raise ValueError("a tree of more than one node needs candidates")
    if candidates_BRC is not None and candidates_BRC.stride(2) != 1:
        candidates_BRC = candidates_BRC.contiguous()
    token_T, position_T, slot_T, index_T, lane_T = lane_B.new_empty(5, num_lanes * num_nodes)
    base_B = torch.empty_like(lane_B)
    _pack_kernel[(num_lanes,)](
        lane_B,
        candidates_BRC,
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
    each token was kept, int32) of the lanes in lane_B, and `result_BR` int64 [B, L + 3]: the tokens drawn along the path (-1
    beyond its end), then how many were drawn, how many kept, and the finish code of speculation/verify.py. A lane that had finished
    keeps nothing.

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
