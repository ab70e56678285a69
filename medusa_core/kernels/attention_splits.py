"""What becomes of a tile's result: it is stored; or, as a part of a split context, left in a workspace, where the last part to
arrive merges them all.

Shapes: M rows of a tile, a query and a head each · V padded value head dim · P splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# In place of -inf as the maximum of no keys: the difference of two of them is 0 and not NaN.
NO_KEYS = tl.constexpr(-1.0e30)


@triton.jit
def no_keys(BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """The result for no keys: weighted sum of values, maximum of the scores, sum of weights; float32."""
    acc_MV = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    peak_M = tl.full([BLOCK_M], NO_KEYS, dtype=tl.float32)
    return acc_MV, peak_M, tl.zeros([BLOCK_M], dtype=tl.float32)


@triton.jit
def store_rows(
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
def store_partial(
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
def arrive(counter_ptr, num_programs):
    """Whether this program is the last of `num_programs` to arrive; if so, it sees all they stored, and the counter is 0 again."""
    # One thread counts for all: the barriers extend its release and acquire to the others' stores and loads.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1
    tl.debug_barrier()
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def merge(
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
    """Joins the splits' results, always in the same order. Returns what the whole context, unsplit, would give."""
    acc_MV, peak_M, total_M = no_keys(BLOCK_M, BLOCK_V)
    dim_V = tl.arange(0, BLOCK_V)
    for first in tl.range(0, num_active, NUM_AT_ONCE):
        # Unrolled, so that all loads are under way together: one after the other, each would wait for memory.
        for offset in tl.static_range(NUM_AT_ONCE):
            part_M = partial_M + first + offset
            mask_M = is_row_M & (first + offset < num_active)
            # .cg: from L2, where other multiprocessors' stores are
            part_peak_M = tl.load(statistics_ptr + part_M * 2, mask=mask_M, other=NO_KEYS, cache_modifier=".cg")
            part_total_M = tl.load(statistics_ptr + part_M * 2 + 1, mask=mask_M, other=0.0, cache_modifier=".cg")
            part_MV = tl.load(
                partial_ptr + part_M[:, None] * VALUE_DIM + dim_V[None, :],
                mask=mask_M[:, None] & (dim_V < VALUE_DIM)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_peak_M = tl.maximum(peak_M, part_peak_M)
            rescale_M = tl.exp2(peak_M - new_peak_M)
            part_scale_M = tl.exp2(part_peak_M - new_peak_M)
            total_M = total_M * rescale_M + part_total_M * part_scale_M
            acc_MV = acc_MV * rescale_M[:, None] + part_MV * part_scale_M[:, None]
            peak_M = new_peak_M
    return acc_MV, peak_M, total_M
