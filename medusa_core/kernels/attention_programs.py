"""The Triton kernels of attention.py: an online softmax over blocks of keys (Milakov and Gimelshein, arXiv:1805.02867).

Shapes: M rows of a tile, a query and a head each · C keys of a block · D/V padded key and value head dim. Indices of
slots and rows are int64, positions int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medusa_core.kernels.attention_splits import LOG2E, arrive, merge, no_keys, store_partial, store_rows


# Not specialised: one compilation serves all tree sizes, numbers of splits and caches.
@triton.jit(do_not_specialize=["table_stride", "spare_slot", "num_nodes"])
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
    READ_AHEAD: tl.constexpr,
    USE_PDL: tl.constexpr,
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
    """One program per (row tile, split, lane and KV head).

    A short context is a chain of loads that wait for each other, so loads start as early as they can: all of one link of the chain
    before the first result is used, and with USE_PDL whatever the kernel before does not write before that kernel is waited for.
    """
    tile, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    lane, kv_head = tl.program_id(2) // NUM_KV_HEADS, tl.program_id(2) % NUM_KV_HEADS
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    index_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row_M = index_M < num_nodes * NUM_REPEATS
    # Padding rows repeat the last node: they need no masks until the store.
    node_M = tl.minimum(index_M // NUM_REPEATS, num_nodes - 1)
    head_M = kv_head * NUM_REPEATS + index_M % NUM_REPEATS
    row_M = (lane * num_nodes + node_M).to(tl.int64)
    query_ptr_M = query_ptr + row_M * query_stride_t + head_M * query_stride_h

    base = tl.load(base_ptr + lane).to(tl.int32)
    # volatile: not moved down to where it is used, behind the branch that waits for `base`
    table_ptr += tl.load(lane_ptr + lane, volatile=True) * table_stride
    depth_M = tl.load(depth_ptr + node_M).to(tl.int32)
    bits_M = tl.load(bits_ptr + node_M)
    if not USE_PDL:
        query_MD = _load_rows(query_ptr_M, KEY_DIM, BLOCK_D)

    # The root comes first in the text, so it sees farthest back.
    first = tl.maximum(base + 1 - WINDOW, 0) if WINDOW > 0 else 0
    end = base + num_nodes
    split_len = tl.cdiv(tl.cdiv(end - first, num_splits), BLOCK_C) * BLOCK_C
    # All programs of a tile agree on this number, so idle ones need not be waited for.
    num_active = tl.cdiv(end - first, split_len)
    if split >= num_active:
        return
    start = first + split * split_len
    stop = tl.minimum(start + split_len, end)
    key_ptr += kv_head * KEY_DIM
    value_ptr += kv_head * VALUE_DIM

    if READ_AHEAD:
        slot_C = start + tl.arange(0, BLOCK_C)
        entry_C = _entries(table_ptr, slot_C, slot_C < stop, spare_slot, NUM_KV_HEADS, BLOCK_SIZE)
        # What is committed was written long ago, the tree's own by the kernel before.
        is_early_C = slot_C < (tl.minimum(base, stop) if USE_PDL else stop)
        key_DC = _load_keys(key_ptr, entry_C, is_early_C, 0.0, KEY_DIM, BLOCK_D)
        value_CV = _load_values(value_ptr, entry_C, is_early_C, 0.0, VALUE_DIM, BLOCK_V)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        query_MD = _load_rows(query_ptr_M, KEY_DIM, BLOCK_D)
        if READ_AHEAD:
            is_late_C = (slot_C >= base) & (slot_C < stop)
            key_DC = _load_keys(key_ptr, entry_C, is_late_C, key_DC, KEY_DIM, BLOCK_D)
            value_CV = _load_values(value_ptr, entry_C, is_late_C, value_CV, VALUE_DIM, BLOCK_V)

    # two words of 32 bits: shifts of 64 are several instructions each
    low_bits_M, high_bits_M = bits_M.to(tl.int32), (bits_M >> 32).to(tl.int32)
    acc_MV, peak_M, total_M = no_keys(BLOCK_M, BLOCK_V)
    if READ_AHEAD:
        acc_MV, peak_M, total_M = _add_block(
            acc_MV,
            peak_M,
            total_M,
            query_MD,
            key_DC,
            value_CV,
            slot_C,
            stop,
            base + depth_M,
            low_bits_M,
            high_bits_M,
            depth_ptr,
            base,
            scaling,
            True,
            WINDOW,
            SOFTCAP,
        )
        start += BLOCK_C
    acc_MV, peak_M, total_M = _attend(
        acc_MV,
        peak_M,
        total_M,
        query_MD,
        base + depth_M,
        low_bits_M,
        high_bits_M,
        key_ptr,
        value_ptr,
        table_ptr,
        depth_ptr,
        spare_slot,
        base,
        start,
        stop,
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
        BLOCK_C,
    )
    out_row_M = row_M * (NUM_KV_HEADS * NUM_REPEATS) + head_M
    if IS_SPLIT and num_active > 1:
        partial_M = out_row_M * num_splits
        store_partial(acc_MV, peak_M, total_M, partial_M + split, is_row_M, partial_ptr, statistics_ptr, VALUE_DIM, BLOCK_V)
        if arrive(counter_ptr + tl.program_id(2) * tl.num_programs(0) + tile, num_active):
            acc_MV, peak_M, total_M = merge(
                partial_M,
                is_row_M,
                num_active,
                partial_ptr,
                statistics_ptr,
                VALUE_DIM,
                BLOCK_V,
                BLOCK_M,
                MERGE_SPLITS,
            )
            store_rows(acc_MV, peak_M, total_M, head_M, sinks_ptr, out_ptr, out_row_M, is_row_M, VALUE_DIM, BLOCK_V)
    else:
        store_rows(acc_MV, peak_M, total_M, head_M, sinks_ptr, out_ptr, out_row_M, is_row_M, VALUE_DIM, BLOCK_V)


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
    acc_MV, peak_M, total_M = no_keys(BLOCK_M, BLOCK_V)
    acc_MV, peak_M, total_M = _attend(
        acc_MV,
        peak_M,
        total_M,
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
        BLOCK_C,
    )
    out_row_M = row_M * (NUM_KV_HEADS * NUM_REPEATS) + head_M
    is_row_M = index_M < num_rows * NUM_REPEATS
    store_rows(acc_MV, peak_M, total_M, head_M, sinks_ptr, out_ptr, out_row_M, is_row_M, VALUE_DIM, BLOCK_V)


@triton.jit
def _attend(
    acc_MV,
    peak_M,
    total_M,
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
    BLOCK_C: tl.constexpr,
):
    """Adds keys [start, end) of one lane and KV head, a block at a time; see _add_block."""
    # Where nothing is left, not even the prologue of the pipelined loop runs.
    if start < end:
        for block_start in tl.range(start, end, BLOCK_C):
            slot_C = block_start + tl.arange(0, BLOCK_C)
            entry_C = _entries(table_ptr, slot_C, slot_C < end, spare_slot, NUM_KV_HEADS, BLOCK_SIZE)
            key_DC = _load_keys(key_ptr, entry_C, slot_C < end, 0.0, KEY_DIM, BLOCK_D)
            value_CV = _load_values(value_ptr, entry_C, slot_C < end, 0.0, VALUE_DIM, BLOCK_V)
            acc_MV, peak_M, total_M = _add_block(
                acc_MV,
                peak_M,
                total_M,
                query_MD,
                key_DC,
                value_CV,
                slot_C,
                end,
                position_M,
                low_bits_M,
                high_bits_M,
                depth_ptr,
                base,
                scaling,
                IS_TREE,
                WINDOW,
                SOFTCAP,
            )
    return acc_MV, peak_M, total_M


@triton.jit
def _entries(table_ptr, slot_C, is_key_C, spare_slot, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where positions of a lane are in the cache, counted in heads of slots."""
    block_C = tl.load(table_ptr + slot_C // BLOCK_SIZE, mask=is_key_C, other=-1)
    return tl.where(block_C < 0, spare_slot, block_C * BLOCK_SIZE + slot_C % BLOCK_SIZE) * NUM_KV_HEADS


@triton.jit
def _load_keys(keys_ptr, entry_C, mask_C, other, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Keys as columns, which is how the product takes them. What is not loaded is `other`."""
    dim_D = tl.arange(0, BLOCK)
    return tl.load(keys_ptr + entry_C[None, :] * DIM + dim_D[:, None], mask=mask_C[None, :] & (dim_D < DIM)[:, None], other=other)


@triton.jit
def _load_values(values_ptr, entry_C, mask_C, other, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Values as rows. 0 for what lies past the end matters: a weight of 0 would not silence a stray NaN."""
    dim_V = tl.arange(0, BLOCK)
    return tl.load(values_ptr + entry_C[:, None] * DIM + dim_V[None, :], mask=mask_C[:, None] & (dim_V < DIM)[None, :], other=other)


@triton.jit
def _add_block(
    acc_MV,
    peak_M,
    total_M,
    query_MD,
    key_DC,
    value_CV,
    slot_C,
    end,
    position_M,
    low_bits_M,
    high_bits_M,
    depth_ptr,
    base,
    scaling,
    IS_TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One step of the online softmax.

    IS_TREE: keys from `base` on are nodes, visible by bits. Else all keys up to the query's position are visible.

    Returns:
        Weighted sum of values, running maximum of the scores (times log2 e), and sum of weights, float32.
    """
    is_key_C = slot_C < end
    score_MC = tl.dot(query_MD, key_DC, input_precision="ieee") * scaling
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
    return acc_MV, new_peak_M, total_M


@triton.jit
def _load_rows(row_ptr_M, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of DIM values, padded with 0 to BLOCK."""
    dim = tl.arange(0, BLOCK)
    return tl.load(row_ptr_M[:, None] + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
