"""Paged attention: trees of draft tokens for many lanes, and chunks of prompts, over the KV cache's slots.

Both kernels fold the query heads that share a KV head into rows, so that keys and values are read once per KV head, and run an online
softmax over blocks of keys (Milakov and Gimelshein, arXiv:1805.02867). Trees can be split over their context so that a single lane
fills the chip; the last program of a tile to arrive merges the parts within the same launch.

All lengths come from device memory: a captured launch serves every context length.

Shapes: T packed query rows · B lanes of the step · P lanes of the runner · N tree nodes · Q chunk tiles · H/G query/KV heads · D/Dv key
and value head dim · S slots of the cache · X block-table width. In kernels: M rows of a tile (query, head) · C keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TREE_NODES = 64  # ancestors are bits of an int64

LOG2E = tl.constexpr(1.4426950408889634)
# In place of -inf as the maximum of no keys: differences of two of them are 0 and not NaN.
NO_KEYS = tl.constexpr(-1.0e30)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTile:
    """How a launch is cut: rows (query x head) and keys of one matrix product, warps, and depth of the load pipeline.

    Rows and keys are powers of two >= 16.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


class SplitWorkspace:
    """Scratch of split launches: partial results and arrival counters.

    The counters are zero between launches, which is what lets a captured launch be replayed. Launches that may overlap in time need a
    workspace each.
    """

    def __init__(self, num_partials: int, value_dim: int, device: torch.device | str) -> None:
        """
        Args:
            num_partials: the largest T * H * num_splits of any launch.
            value_dim: the largest Dv of any layer.
        """
        self.num_partials = num_partials
        self.value_dim = value_dim
        self.partials = torch.empty(num_partials * value_dim, dtype=torch.float32, device=device)
        # running maximum and sum of each partial row
        self.statistics = torch.empty(num_partials * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(num_partials, dtype=torch.int32, device=device)


# float32 products run without tensor cores, their operands in registers: larger tiles spill.
_FLOAT32_TILE = AttentionTile(block_rows=16, block_keys=32, num_warps=4, num_stages=2)


def tree_tile(num_lanes: int, num_nodes: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> AttentionTile:
    """The tile of a tree launch: small while few lanes leave the chip empty, larger where re-reading keys would cost bandwidth."""
    if dtype == torch.float32:
        return _FLOAT32_TILE
    num_rows = num_nodes * (num_heads // num_kv_heads)
    if num_lanes * num_rows <= 256:
        block_rows = 16
    elif num_lanes * num_rows <= 1024:
        block_rows = 32
    else:
        block_rows = 64
    block_rows = min(block_rows, max(16, triton.next_power_of_2(num_rows)))
    return AttentionTile(block_rows=block_rows, block_keys=64, num_warps=4, num_stages=3)


def tree_splits(
    num_lanes: int, num_nodes: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype, num_programs: int = 264
) -> int:
    """How many parts to cut each context into so that a launch has about `num_programs` programs (two per multiprocessor of an H200).

    Contexts too short for that many parts of a key block each use fewer, decided on the device.
    """
    block_rows = tree_tile(num_lanes, num_nodes, num_heads, num_kv_heads, dtype).block_rows
    num_tiles = triton.cdiv(num_nodes * (num_heads // num_kv_heads), block_rows)
    return int(max(1, min(32, num_programs // (num_lanes * num_kv_heads * num_tiles))))


def chunk_tile_rows(num_heads: int, num_kv_heads: int) -> int:
    """Packed rows of a prompt tile: with the query heads of one KV head they fill a block of 64 rows."""
    return max(1, 64 // (num_heads // num_kv_heads))


def tree_attention(
    query_THD: Tensor,
    key_slots_SGD: Tensor,
    value_slots_SGD: Tensor,
    *,
    block_table_PX: Tensor,
    lane_B: Tensor,
    base_B: Tensor,
    depth_N: Tensor,
    ancestor_bits_N: Tensor,
    block_size: int,
    spare_slot: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    num_splits: int = 1,
    workspace: SplitWorkspace | None = None,
    out_THDv: Tensor | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """Attention of B trees of N nodes each, T = B * N rows, lane-major. The trees' own K/V are in the cache already.

    Node i of a lane sees every position < base, and position base + j iff bit j of its ancestor bits is set.

    Args:
        query_THD: float16, bfloat16 or float32; any strides but the last, which is 1.
        key_slots_SGD, value_slots_SGD: contiguous, the query's dtype. What lies beyond the visible slots may be NaN.
        block_table_PX: int64, block of each run of `block_size` positions; -1 = none, read as `spare_slot`.
        lane_B: int64, row of the block table of each lane of the step.
        base_B: int64, committed tokens of each lane; its nodes are at positions base .. base + N - 1 of its block table.
        depth_N: int32 or int64, depth of each node; its position in the text is base + depth.
        ancestor_bits_N: int64, bit j: node j is an ancestor of, or is, this node. The diagonal must be set.
        window: a key is visible only if query position - key position < window.
        softcap: scores become softcap * tanh(score / softcap).
        sinks_H: a logit per head that joins the softmax's denominator only.
        num_splits: parts of each context, see tree_splits. A result does not depend on the order in which programs run.
        workspace: needed if num_splits > 1; mutated, counters end at zero.
        out_THDv: written and returned if given; contiguous.
        tile: overrides tree_tile.

    Returns:
        [T, H, Dv] in the query's dtype.

    Raises:
        ValueError: too many nodes, or a workspace that is missing or too small.
    """
    num_rows, num_heads, key_dim = query_THD.shape
    num_kv_heads, value_dim = value_slots_SGD.shape[1:]
    num_lanes, num_nodes = lane_B.shape[0], depth_N.shape[0]
    if num_nodes > MAX_TREE_NODES:
        raise ValueError(f"a tree of {num_nodes} nodes; ancestor bits hold {MAX_TREE_NODES}")
    if num_splits > 1:
        _check_workspace(workspace, num_rows * num_heads * num_splits, value_dim)
    if out_THDv is None:
        out_THDv = query_THD.new_empty(num_rows, num_heads, value_dim)
    if tile is None:
        tile = tree_tile(num_lanes, num_nodes, num_heads, num_kv_heads, query_THD.dtype)
    is_split = workspace is not None and num_splits > 1
    num_repeats = num_heads // num_kv_heads
    grid = (triton.cdiv(num_nodes * num_repeats, tile.block_rows), num_splits, num_lanes * num_kv_heads)
    _tree_kernel[grid](
        query_THD,
        key_slots_SGD,
        value_slots_SGD,
        out_THDv,
        block_table_PX,
        lane_B,
        base_B,
        depth_N,
        ancestor_bits_N,
        sinks_H,
        workspace.partials if workspace is not None and is_split else None,
        workspace.statistics if workspace is not None and is_split else None,
        workspace.counters if workspace is not None and is_split else None,
        query_THD.stride(0),
        query_THD.stride(1),
        block_table_PX.stride(0),
        spare_slot,
        scaling,
        NUM_NODES=num_nodes,
        NUM_SPLITS=num_splits,
        **_layer_constants(num_heads, num_kv_heads, key_dim, value_dim, block_size, window, softcap),
        BLOCK_M=tile.block_rows,
        BLOCK_C=tile.block_keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_THDv


def chunk_attention(
    query_THD: Tensor,
    key_slots_SGD: Tensor,
    value_slots_SGD: Tensor,
    *,
    block_table_PX: Tensor,
    tile_lane_Q: Tensor,
    tile_row_Q: Tensor,
    tile_num_rows_Q: Tensor,
    tile_position_Q: Tensor,
    tile_rows: int,
    block_size: int,
    spare_slot: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    out_THDv: Tensor | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """Causal attention of prompt chunks, cut into Q tiles of consecutive rows. The chunks' own K/V are in the cache already.

    Tile q holds packed rows [tile_row, tile_row + tile_num_rows) of one lane, the first at position tile_position. A row sees every
    position of its lane up to its own.

    Args:
        tile_lane_Q, tile_row_Q, tile_num_rows_Q, tile_position_Q: int32. A tile of 0 rows is not used. tile_lane is a row of the
            block table.
        tile_rows: the most rows of a tile, see chunk_tile_rows.
        tile: overrides the launch's own choice.
        others: as in tree_attention.

    Returns:
        [T, H, Dv] in the query's dtype. Rows that no tile holds are left as they were.
    """
    num_rows, num_heads, key_dim = query_THD.shape
    num_kv_heads, value_dim = value_slots_SGD.shape[1:]
    if out_THDv is None:
        out_THDv = query_THD.new_empty(num_rows, num_heads, value_dim)
    num_tile_rows = tile_rows * (num_heads // num_kv_heads)
    if tile is None:
        tile = _chunk_tile(num_tile_rows, query_THD.dtype)
    _chunk_kernel[(triton.cdiv(num_tile_rows, tile.block_rows), num_kv_heads, tile_row_Q.shape[0])](
        query_THD,
        key_slots_SGD,
        value_slots_SGD,
        out_THDv,
        block_table_PX,
        tile_lane_Q,
        tile_row_Q,
        tile_num_rows_Q,
        tile_position_Q,
        sinks_H,
        query_THD.stride(0),
        query_THD.stride(1),
        block_table_PX.stride(0),
        spare_slot,
        scaling,
        **_layer_constants(num_heads, num_kv_heads, key_dim, value_dim, block_size, window, softcap),
        BLOCK_M=tile.block_rows,
        BLOCK_C=tile.block_keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_THDv


def _chunk_tile(num_tile_rows: int, dtype: torch.dtype) -> AttentionTile:
    if dtype == torch.float32:
        return _FLOAT32_TILE
    block_rows = min(128, max(16, triton.next_power_of_2(num_tile_rows)))
    return AttentionTile(block_rows=block_rows, block_keys=64, num_warps=4 if block_rows <= 64 else 8, num_stages=3)


def _check_workspace(workspace: SplitWorkspace | None, num_partials: int, value_dim: int) -> None:
    if workspace is None:
        raise ValueError("num_splits > 1 needs a workspace")
    if num_partials > workspace.num_partials or value_dim > workspace.value_dim:
        raise ValueError(
            f"workspace holds {workspace.num_partials} partial rows of {workspace.value_dim} values; "
            f"this launch needs {num_partials} of {value_dim}"
        )


def _layer_constants(
    num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int, block_size: int, window: int | None, softcap: float | None
) -> dict[str, int | float]:
    """What both kernels are compiled for."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "NUM_REPEATS": num_heads // num_kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": window or 0,
        "SOFTCAP": softcap or 0.0,
        "BLOCK_D": max(16, triton.next_power_of_2(key_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }


@triton.jit
def _tree_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    table_ptr,
    lane_ptr,
    base_ptr,
    depth_ptr,
    bits_ptr,
    sinks_ptr,
    partial_ptr,
    statistics_ptr,
    counter_ptr,
    query_stride_t,
    query_stride_h,
    table_stride,
    spare_slot,
    scaling,
    NUM_NODES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_REPEATS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per (row tile, split, lane and KV head)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    lane, kv_head = tl.program_id(2) // NUM_KV_HEADS, tl.program_id(2) % NUM_KV_HEADS
    base = tl.load(base_ptr + lane).to(tl.int32)
    # The root comes first in the text, so it sees farthest back.
    first = tl.maximum(base + 1 - WINDOW, 0) if WINDOW > 0 else 0
    end = base + NUM_NODES
    split_len = tl.cdiv(tl.cdiv(end - first, NUM_SPLITS), BLOCK_C) * BLOCK_C
    # All programs of a tile agree on this number, so idle ones need not be waited for.
    num_active = tl.cdiv(end - first, split_len)
    if split >= num_active:
        return

    index_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row_M = index_M < NUM_NODES * NUM_REPEATS
    # Padding rows repeat the last node: they need no masks until the store.
    node_M = tl.minimum(index_M // NUM_REPEATS, NUM_NODES - 1)
    head_M = kv_head * NUM_REPEATS + index_M % NUM_REPEATS
    row_M = (lane * NUM_NODES + node_M).to(tl.int64)
    query_MD = _load_rows(query_ptr + row_M * query_stride_t + head_M * query_stride_h, KEY_DIM, BLOCK_D)
    position_M = base + tl.load(depth_ptr + node_M).to(tl.int32)
    bits_M = tl.load(bits_ptr + node_M)

    start = first + split * split_len
    acc_MV, peak_M, total_M = _attend(
        query_MD,
        position_M,
        # two words of 32 bits: shifts of 64 are several instructions each
        bits_M.to(tl.int32),
        (bits_M >> 32).to(tl.int32),
        key_ptr + kv_head * KEY_DIM,
        value_ptr + kv_head * VALUE_DIM,
        table_ptr + tl.load(lane_ptr + lane) * table_stride,
        depth_ptr,
        spare_slot,
        base,
        start,
        tl.minimum(start + split_len, end),
        scaling,
        NUM_NODES,
        NUM_KV_HEADS,
        KEY_DIM,
        VALUE_DIM,
        BLOCK_SIZE,
        WINDOW,
        SOFTCAP,
        BLOCK_D,
        BLOCK_V,
        BLOCK_M,
        BLOCK_C,
    )
    out_row_M = row_M * (NUM_KV_HEADS * NUM_REPEATS) + head_M
    is_done = True
    if NUM_SPLITS > 1:
        unit = tl.program_id(2) * tl.num_programs(0) + tile
        is_done = num_active == 1
        if num_active > 1:
            _store_partial(
                acc_MV, peak_M, total_M, out_row_M * NUM_SPLITS + split, is_row_M, partial_ptr, statistics_ptr, VALUE_DIM, BLOCK_V
            )
            is_done = _arrive(counter_ptr + unit, num_active)
            if is_done:
                acc_MV, peak_M, total_M = _merge(
                    out_row_M * NUM_SPLITS, is_row_M, num_active, partial_ptr, statistics_ptr, VALUE_DIM, BLOCK_V, BLOCK_M
                )
    if is_done:
        _store_rows(acc_MV, peak_M, total_M, head_M, sinks_ptr, out_ptr, out_row_M, is_row_M, VALUE_DIM, BLOCK_V)


@triton.jit
def _chunk_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    table_ptr,
    tile_lane_ptr,
    tile_row_ptr,
    tile_num_rows_ptr,
    tile_position_ptr,
    sinks_ptr,
    query_stride_t,
    query_stride_h,
    table_stride,
    spare_slot,
    scaling,
    NUM_KV_HEADS: tl.constexpr,
    NUM_REPEATS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per (block of a tile's rows and heads, KV head, tile)."""
    first_index, kv_head, tile = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    num_rows = tl.load(tile_num_rows_ptr + tile)
    if first_index >= num_rows * NUM_REPEATS:
        return
    position = tl.load(tile_position_ptr + tile)
    first = tl.maximum(position + 1 - WINDOW, 0) if WINDOW > 0 else 0

    index_M = first_index + tl.arange(0, BLOCK_M)
    # Padding rows repeat the last row: they need no masks until the store.
    offset_M = tl.minimum(index_M // NUM_REPEATS, num_rows - 1)
    head_M = kv_head * NUM_REPEATS + index_M % NUM_REPEATS
    row_M = (tl.load(tile_row_ptr + tile) + offset_M).to(tl.int64)
    position_M = position + offset_M
    query_MD = _load_rows(query_ptr + row_M * query_stride_t + head_M * query_stride_h, KEY_DIM, BLOCK_D)
    acc_MV, peak_M, total_M = _attend(
        query_MD,
        position_M,
        None,
        None,
        key_ptr + kv_head * KEY_DIM,
        value_ptr + kv_head * VALUE_DIM,
        table_ptr + tl.load(tile_lane_ptr + tile).to(tl.int64) * table_stride,
        None,
        spare_slot,
        0,
        first,
        position + num_rows,
        scaling,
        0,
        NUM_KV_HEADS,
        KEY_DIM,
        VALUE_DIM,
        BLOCK_SIZE,
        WINDOW,
        SOFTCAP,
        BLOCK_D,
        BLOCK_V,
        BLOCK_M,
        BLOCK_C,
    )
    out_row_M = row_M * (NUM_KV_HEADS * NUM_REPEATS) + head_M
    is_row_M = index_M < num_rows * NUM_REPEATS
    _store_rows(acc_MV, peak_M, total_M, head_M, sinks_ptr, out_ptr, out_row_M, is_row_M, VALUE_DIM, BLOCK_V)


@triton.jit
def _attend(
    query_MD,
    position_M,
    low_bits_M,
    high_bits_M,
    key_ptr,
    value_ptr,
    table_ptr,
    depth_ptr,
    spare_slot,
    base,
    start,
    end,
    scaling,
    NUM_NODES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Online softmax over keys [start, end) of one lane and KV head.

    NUM_NODES 0: causal by position. Else keys from `base` on are tree nodes, visible by bits.

    Returns:
        Weighted sum of values, running maximum of the scores (times log2 e), and sum of weights, float32.
    """
    acc_MV = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    peak_M = tl.full([BLOCK_M], NO_KEYS, dtype=tl.float32)
    total_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    dim_D, dim_V = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for block_start in tl.range(start, end, BLOCK_C):
        slot_C = block_start + tl.arange(0, BLOCK_C)
        is_key_C = slot_C < end
        block_C = tl.load(table_ptr + slot_C // BLOCK_SIZE, mask=is_key_C, other=-1)
        row_C = tl.where(block_C < 0, spare_slot, block_C * BLOCK_SIZE + slot_C % BLOCK_SIZE) * NUM_KV_HEADS
        # Loads past the end give 0: a weight of 0 would not silence a stray NaN.
        key_CD = tl.load(
            key_ptr + row_C[:, None] * KEY_DIM + dim_D[None, :], mask=is_key_C[:, None] & (dim_D < KEY_DIM)[None, :], other=0.0
        )
        value_CV = tl.load(
            value_ptr + row_C[:, None] * VALUE_DIM + dim_V[None, :],
            mask=is_key_C[:, None] & (dim_V < VALUE_DIM)[None, :],
            other=0.0,
        )
        score_MC = tl.dot(query_MD, tl.trans(key_CD), input_precision="ieee") * scaling
        if SOFTCAP > 0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            score_MC = SOFTCAP * (1.0 - 2.0 / (tl.exp2(score_MC * (2.0 * LOG2E / SOFTCAP)) + 1.0))

        key_position_C = slot_C
        if NUM_NODES > 0:
            node_C = slot_C - base
            word_MC = low_bits_M[:, None]
            if NUM_NODES > 32:
                word_MC = tl.where((node_C < 32)[None, :], low_bits_M[:, None], high_bits_M[:, None])
            is_visible_MC = (node_C < 0)[None, :] | (((word_MC >> (node_C & 31)[None, :]) & 1) != 0)
            if WINDOW > 0:
                depth_C = tl.load(depth_ptr + node_C, mask=(node_C >= 0) & is_key_C, other=0).to(tl.int32)
                key_position_C = tl.minimum(slot_C, base) + depth_C
        else:
            is_visible_MC = slot_C[None, :] <= position_M[:, None]
        if WINDOW > 0:
            is_visible_MC &= position_M[:, None] - key_position_C[None, :] < WINDOW
        score_MC = tl.where(is_visible_MC & is_key_C[None, :], score_MC * LOG2E, float("-inf"))

        new_peak_M = tl.maximum(peak_M, tl.max(score_MC, axis=1))
        weight_MC = tl.exp2(score_MC - new_peak_M[:, None])
        rescale_M = tl.exp2(peak_M - new_peak_M)
        total_M = total_M * rescale_M + tl.sum(weight_MC, axis=1)
        acc_MV = tl.dot(weight_MC.to(value_CV.dtype), value_CV, acc_MV * rescale_M[:, None], input_precision="ieee")
        peak_M = new_peak_M
    return acc_MV, peak_M, total_M


@triton.jit
def _load_rows(row_ptr_M, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of DIM values, padded with 0 to BLOCK."""
    dim = tl.arange(0, BLOCK)
    return tl.load(row_ptr_M[:, None] + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(
    acc_MV, peak_M, total_M, head_M, sinks_ptr, out_ptr, out_row_M, is_row_M, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Adds the sink to the denominator, divides, stores."""
    if sinks_ptr is not None:
        sink_M = tl.load(sinks_ptr + head_M).to(tl.float32) * LOG2E
        new_peak_M = tl.maximum(peak_M, sink_M)
        rescale_M = tl.exp2(peak_M - new_peak_M)
        total_M = total_M * rescale_M + tl.exp2(sink_M - new_peak_M)
        acc_MV *= rescale_M[:, None]
    dim_V = tl.arange(0, BLOCK_V)
    tl.store(
        out_ptr + out_row_M[:, None] * VALUE_DIM + dim_V[None, :],
        (acc_MV / total_M[:, None]).to(out_ptr.dtype.element_ty),
        mask=is_row_M[:, None] & (dim_V < VALUE_DIM)[None, :],
    )


@triton.jit
def _store_partial(
    acc_MV, peak_M, total_M, partial_M, is_row_M, partial_ptr, statistics_ptr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Leaves one split's result in the workspace."""
    dim_V = tl.arange(0, BLOCK_V)
    tl.store(
        partial_ptr + partial_M[:, None] * VALUE_DIM + dim_V[None, :],
        acc_MV,
        mask=is_row_M[:, None] & (dim_V < VALUE_DIM)[None, :],
    )
    tl.store(statistics_ptr + partial_M * 2, peak_M, mask=is_row_M)
    tl.store(statistics_ptr + partial_M * 2 + 1, total_M, mask=is_row_M)


@triton.jit
def _arrive(counter_ptr, num_programs):
    """Whether this program is the last of `num_programs` to arrive; if so, all they stored is visible to it and the counter is 0."""
    # One thread counts for all: the barriers extend its release and acquire to the others' stores and loads.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1
    tl.debug_barrier()
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _merge(
    partial_M,
    is_row_M,
    num_active,
    partial_ptr,
    statistics_ptr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Joins the splits' results, always in the same order. Returns what _attend would for the whole context."""
    acc_MV = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    peak_M = tl.full([BLOCK_M], NO_KEYS, dtype=tl.float32)
    total_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    dim_V = tl.arange(0, BLOCK_V)
    for split in tl.range(0, num_active):
        # .cg: from L2, where other multiprocessors' stores are
        part_M = partial_M + split
        part_peak_M = tl.load(statistics_ptr + part_M * 2, mask=is_row_M, other=0.0, cache_modifier=".cg")
        part_total_M = tl.load(statistics_ptr + part_M * 2 + 1, mask=is_row_M, other=1.0, cache_modifier=".cg")
        part_MV = tl.load(
            partial_ptr + part_M[:, None] * VALUE_DIM + dim_V[None, :],
            mask=is_row_M[:, None] & (dim_V < VALUE_DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak_M = tl.maximum(peak_M, part_peak_M)
        rescale_M, part_scale_M = tl.exp2(peak_M - new_peak_M), tl.exp2(part_peak_M - new_peak_M)
        total_M = total_M * rescale_M + part_total_M * part_scale_M
        acc_MV = acc_MV * rescale_M[:, None] + part_MV * part_scale_M[:, None]
        peak_M = new_peak_M
    return acc_MV, peak_M, total_M
