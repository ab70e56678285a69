"""The Triton kernels of attention.py: an online softmax over blocks of keys (Milakov and Gimelshein, arXiv:1805.02867).

Shapes: M rows of a tile, a query and a head each · C keys of a block · D/V padded key and value head dim · P splits. Indices of
slots and rows are int64, positions int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# In place of -inf as the maximum of no keys: the difference of two of them is 0 and not NaN.
NO_KEYS = tl.constexpr(-1.0e30)


# Not specialised: one compilation serves all tree sizes and numbers of splits.
@triton.jit(do_not_specialize=["num_nodes"])
def tree_kernel(
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
    num_nodes,
    IS_SPLIT: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
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
    tile, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    lane, kv_head = tl.program_id(2) // NUM_KV_HEADS, tl.program_id(2) % NUM_KV_HEADS
    base = tl.load(base_ptr + lane).to(tl.int32)
    # The root comes first in the text, so it sees farthest back.
    first = tl.maximum(base + 1 - WINDOW, 0) if WINDOW > 0 else 0
    end = base + num_nodes
    split_len = tl.cdiv(tl.cdiv(end - first, num_splits), BLOCK_C) * BLOCK_C
    # All programs of a tile agree on this number, so idle ones need not be waited for.
    num_active = tl.cdiv(end - first, split_len)
    if split >= num_active:
        return

    index_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row_M = index_M < num_nodes * NUM_REPEATS
    # Padding rows repeat the last node: they need no masks until the store.
    node_M = tl.minimum(index_M // NUM_REPEATS, num_nodes - 1)
    head_M = kv_head * NUM_REPEATS + index_M % NUM_REPEATS
    row_M = (lane * num_nodes + node_M).to(tl.int64)
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
        True,
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
    if IS_SPLIT:
        unit = tl.program_id(2) * tl.num_programs(0) + tile
        is_done = num_active == 1
        if num_active > 1:
            _store_partial(
                acc_MV, peak_M, total_M, out_row_M * num_splits + split, is_row_M, partial_ptr, statistics_ptr, VALUE_DIM, BLOCK_V
            )
            is_done = _arrive(counter_ptr + unit, num_active)
            if is_done:
                acc_MV, peak_M, total_M = _merge(
                    out_row_M * num_splits,
                    is_row_M,
                    num_active,
                    partial_ptr,
                    statistics_ptr,
                    VALUE_DIM,
                    BLOCK_V,
                    BLOCK_M,
                    MERGE_SPLITS,
                )
    if is_done:
        _store_rows(acc_MV, peak_M, total_M, head_M, sinks_ptr, out_ptr, out_row_M, is_row_M, VALUE_DIM, BLOCK_V)


@triton.jit
def chunk_kernel(
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
        False,
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
    IS_TREE: tl.constexpr,
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

    IS_TREE: keys from `base` on are nodes, visible by bits. Else all keys up to the query's position are visible.

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
        if IS_TREE:
            node_C = slot_C - base
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
    # padding rows of a merge hold nothing
    total_M = tl.where(is_row_M, total_M, 1.0)
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
    """Whether this program is the last of `num_programs` to arrive; if so, it sees all they stored, and the counter is 0 again."""
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
    NUM_AT_ONCE: tl.constexpr,
):
    """Joins the splits' results, always in the same order. Returns what _attend would for the whole context."""
    acc_MV = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    peak_M = tl.full([BLOCK_M], NO_KEYS, dtype=tl.float32)
    total_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    dim_V = tl.arange(0, BLOCK_V)
    # Several splits at once, as many as registers hold: one after the other, each would wait for memory.
    for first in tl.range(0, num_active, NUM_AT_ONCE):
        split_P = first + tl.arange(0, NUM_AT_ONCE)
        part_PM = partial_M[None, :] + split_P[:, None]
        mask_PM = is_row_M[None, :] & (split_P < num_active)[:, None]
        # .cg: from L2, where other multiprocessors' stores are
        part_peak_PM = tl.load(statistics_ptr + part_PM * 2, mask=mask_PM, other=NO_KEYS, cache_modifier=".cg")
        part_total_PM = tl.load(statistics_ptr + part_PM * 2 + 1, mask=mask_PM, other=0.0, cache_modifier=".cg")
        part_PMV = tl.load(
            partial_ptr + part_PM[:, :, None] * VALUE_DIM + dim_V[None, None, :],
            mask=mask_PM[:, :, None] & (dim_V < VALUE_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak_M = tl.maximum(peak_M, tl.max(part_peak_PM, axis=0))
        rescale_M = tl.exp2(peak_M - new_peak_M)
        part_scale_PM = tl.exp2(part_peak_PM - new_peak_M[None, :])
        total_M = total_M * rescale_M + tl.sum(part_total_PM * part_scale_PM, axis=0)
        acc_MV = acc_MV * rescale_M[:, None] + tl.sum(part_PMV * part_scale_PM[:, :, None], axis=0)
        peak_M = new_peak_M
    return acc_MV, peak_M, total_M
