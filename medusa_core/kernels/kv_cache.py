"""Writing to the KV cache: new keys and values to their slots, and accepted paths to the slots they end up in.

Shapes: T packed rows · Y layers of one shape · B lanes · L path length · S slots of the cache · G KV heads · D/Dv key and value
head dim. In kernels: R rows of a program · W elements of a slot.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

MAX_PATH_LEN = 64
_WRITE_ELEMENTS = 1024  # per program of write_kv
_MOVE_ELEMENTS = 4096  # per program of commit_path; all of them are held in registers at once


def write_kv(key_TGD: Tensor, value_TGDv: Tensor, key_slots_SGD: Tensor, value_slots_SGD: Tensor, slots_T: Tensor) -> None:
    """Write one layer's new keys and values to their slots, in one launch.

    Args:
        key_TGD, value_TGDv: any strides but the last, which is 1.
        key_slots_SGD, value_slots_SGD: contiguous; mutated.
        slots_T: int64; rows with a negative slot are not written. Rows that share a slot leave it with any of their values.
    """
    num_rows, num_heads, key_dim = key_TGD.shape
    value_dim = value_TGDv.shape[2]
    slot_elements = num_heads * max(key_dim, value_dim)
    block_elements = min(_WRITE_ELEMENTS, triton.next_power_of_2(slot_elements))
    block_rows = _WRITE_ELEMENTS // block_elements
    _write_kernel[(triton.cdiv(num_rows, block_rows), triton.cdiv(slot_elements, block_elements), 2)](
        key_TGD,
        value_TGDv,
        key_slots_SGD,
        value_slots_SGD,
        slots_T,
        num_rows,
        key_TGD.stride(0),
        key_TGD.stride(1),
        value_TGDv.stride(0),
        value_TGDv.stride(1),
        NUM_HEADS=num_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_R=block_rows,
        BLOCK_W=block_elements,
        num_warps=4,
    )


def commit_path(key_YSGD: Tensor, value_YSGDv: Tensor, source_BL: Tensor, target_BL: Tensor, *, use_pdl: bool = False) -> None:
    """Move slots to other slots in every layer, in one launch.

    All sources of a lane are read before any of its targets is written, so the two may overlap. Lanes must not share slots, except
    that several may write a spare slot nobody reads.

    Args:
        key_YSGD, value_YSGDv: contiguous; mutated.
        source_BL, target_BL: int64. Entries with a negative slot, or with source == target, are skipped.
        use_pdl: launch while the kernel before still runs (programmatic dependent launch, sm_90 and later).

    Raises:
        ValueError: a path longer than MAX_PATH_LEN.
    """
    num_lanes, path_len = source_BL.shape
    num_layers, num_slots, num_heads, key_dim = key_YSGD.shape
    value_dim = value_YSGDv.shape[3]
    if path_len > MAX_PATH_LEN:
        raise ValueError(f"a path of {path_len} slots; at most {MAX_PATH_LEN} can be moved at once")
    block_path = triton.next_power_of_2(path_len)
    slot_elements = num_heads * max(key_dim, value_dim)
    block_elements = min(_MOVE_ELEMENTS // block_path, triton.next_power_of_2(slot_elements))
    _commit_kernel[(num_lanes, num_layers, 2 * triton.cdiv(slot_elements, block_elements))](
        key_YSGD,
        value_YSGDv,
        source_BL,
        target_BL,
        num_slots,
        source_BL.stride(0),
        target_BL.stride(0),
        PATH_LEN=path_len,
        KEY_WIDTH=num_heads * key_dim,
        VALUE_WIDTH=num_heads * value_dim,
        BLOCK_L=block_path,
        BLOCK_W=block_elements,
        USE_PDL=use_pdl,
        num_warps=4,
        **launch_options(use_pdl),
    )


@triton.jit
def _write_kernel(
    key_ptr,
    value_ptr,
    key_slots_ptr,
    value_slots_ptr,
    slot_ptr,
    num_rows,
    key_stride_t,
    key_stride_g,
    value_stride_t,
    value_stride_g,
    NUM_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program per (rows, elements, key or value)."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    element_W = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    slot_R = tl.load(slot_ptr + row_R, mask=row_R < num_rows, other=-1)
    row_R = row_R.to(tl.int64)
    if tl.program_id(2) == 0:
        _write_rows(key_ptr, key_slots_ptr, row_R, slot_R, element_W, key_stride_t, key_stride_g, NUM_HEADS, KEY_DIM)
    else:
        _write_rows(value_ptr, value_slots_ptr, row_R, slot_R, element_W, value_stride_t, value_stride_g, NUM_HEADS, VALUE_DIM)


@triton.jit
def _write_rows(source_ptr, slots_ptr, row_R, slot_R, element_W, stride_t, stride_g, NUM_HEADS: tl.constexpr, DIM: tl.constexpr):
    mask_RW = (slot_R >= 0)[:, None] & (element_W < NUM_HEADS * DIM)[None, :]
    offset_W = element_W // DIM * stride_g + element_W % DIM
    value_RW = tl.load(source_ptr + row_R[:, None] * stride_t + offset_W[None, :], mask=mask_RW)
    tl.store(slots_ptr + slot_R[:, None] * (NUM_HEADS * DIM) + element_W[None, :], value_RW, mask=mask_RW)


@triton.jit
def _commit_kernel(
    key_ptr,
    value_ptr,
    source_ptr,
    target_ptr,
    num_slots,
    source_stride,
    target_stride,
    PATH_LEN: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program per (lane, layer, elements of keys or values)."""
    follow_on(USE_PDL)
    lane, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    idx_L = tl.arange(0, BLOCK_L)
    source_L = tl.load(source_ptr + lane * source_stride + idx_L, mask=idx_L < PATH_LEN, other=-1)
    target_L = tl.load(target_ptr + lane * target_stride + idx_L, mask=idx_L < PATH_LEN, other=-1)
    is_moved_L = (source_L >= 0) & (target_L >= 0) & (source_L != target_L)
    element_W = tl.program_id(2) // 2 * BLOCK_W + tl.arange(0, BLOCK_W)
    if tl.program_id(2) % 2 == 0:
        _move_slots(key_ptr + layer * num_slots * KEY_WIDTH, source_L, target_L, is_moved_L, element_W, KEY_WIDTH)
    else:
        _move_slots(value_ptr + layer * num_slots * VALUE_WIDTH, source_L, target_L, is_moved_L, element_W, VALUE_WIDTH)


@triton.jit
def _move_slots(layer_ptr, source_L, target_L, is_moved_L, element_W, WIDTH: tl.constexpr):
    mask_LW = is_moved_L[:, None] & (element_W < WIDTH)[None, :]
    value_LW = tl.load(layer_ptr + source_L[:, None] * WIDTH + element_W[None, :], mask=mask_LW)
    # One thread's target may be another thread's source.
    tl.debug_barrier()
    tl.store(layer_ptr + target_L[:, None] * WIDTH + element_W[None, :], value_LW, mask=mask_LW)
