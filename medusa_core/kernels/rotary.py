"""Between the QKV product and attention, in one launch: split, per-head norm, rotary embedding, keys and values to their slots."""

# Shape suffixes: T rows · F q, k and v side by side · H/G query/KV heads · D head dim · S slots

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import launch_options

_BLOCK_HEADS = 16


@triton.jit
def _head_norm(low_HD, high_HD, weight_low_HD, weight_high_HD, eps, HALF: tl.constexpr):
    """RMS norm over each head."""
    dtype: tl.constexpr = low_HD.dtype
    low_HD, high_HD = low_HD.to(tl.float32), high_HD.to(tl.float32)
    total_H = tl.sum(low_HD * low_HD, axis=1) + tl.sum(high_HD * high_HD, axis=1)
    scale_HD = tl.rsqrt(total_H / (2 * HALF) + eps)[:, None]
    low_HD = (low_HD * scale_HD).to(dtype).to(tl.float32) * weight_low_HD.to(tl.float32)
    high_HD = (high_HD * scale_HD).to(dtype).to(tl.float32) * weight_high_HD.to(tl.float32)
    return low_HD.to(dtype), high_HD.to(dtype)


@triton.jit
def _store_halves(target_HD, low_HD, high_HD, mask_HD, HALF: tl.constexpr):
    tl.store(target_HD, low_HD, mask=mask_HD)
    tl.store(target_HD + HALF, high_HD, mask=mask_HD)


@triton.jit
def _rotate_and_write_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    slots,
    key_slots,
    value_slots,
    query,
    cos_stride,
    sin_stride,
    key_slot_stride,
    value_slot_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Grid: (rows, blocks of the H + 2G heads). A head is kept as two halves, low and high, which rotate into each other."""
    HEAD_DIM: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    d_D = tl.arange(0, BLOCK_HALF)[None, :]
    in_half_D = d_D < HALF
    is_query_H = head_H < NUM_HEADS
    is_key_H = (head_H >= NUM_HEADS) & (head_H < NUM_HEADS + NUM_KV_HEADS)
    is_value_H = (head_H >= NUM_HEADS + NUM_KV_HEADS) & (head_H < NUM_HEADS + 2 * NUM_KV_HEADS)
    mask_HD = in_half_D & (head_H < NUM_HEADS + 2 * NUM_KV_HEADS)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source_HD = qkv + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head_H) * HEAD_DIM + d_D
    low_HD = tl.load(source_HD, mask=mask_HD, other=0.0)
    high_HD = tl.load(source_HD + HALF, mask=mask_HD, other=0.0)
    cos_low_D = tl.load(cos + row * cos_stride + d_D, mask=in_half_D, other=0.0).to(tl.float32)
    cos_high_D = tl.load(cos + row * cos_stride + HALF + d_D, mask=in_half_D, other=0.0).to(tl.float32)
    sin_low_D = tl.load(sin + row * sin_stride + d_D, mask=in_half_D, other=0.0).to(tl.float32)
    sin_high_D = tl.load(sin + row * sin_stride + HALF + d_D, mask=in_half_D, other=0.0).to(tl.float32)
    slot = tl.load(slots + row)
    value_HD = value_slots + slot * value_slot_stride + (head_H - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM + d_D
    _store_halves(value_HD, low_HD, high_HD, in_half_D & is_value_H, HALF)

    if HAS_NORM:
        norm_low_D = tl.load(q_norm + d_D, mask=in_half_D, other=0.0)
        norm_high_D = tl.load(q_norm + HALF + d_D, mask=in_half_D, other=0.0)
        k_norm_low_D = tl.load(k_norm + d_D, mask=in_half_D, other=0.0)
        k_norm_high_D = tl.load(k_norm + HALF + d_D, mask=in_half_D, other=0.0)
        norm_low_HD = tl.where(is_query_H, norm_low_D, k_norm_low_D)
        norm_high_HD = tl.where(is_query_H, norm_high_D, k_norm_high_D)
        low_HD, high_HD = _head_norm(low_HD, high_HD, norm_low_HD, norm_high_HD, eps, HALF)

    # q * cos + rotate_half(q) * sin, each product rounded to the dtype as elementwise modules round it
    dtype: tl.constexpr = low_HD.dtype
    low_HD, high_HD = low_HD.to(tl.float32), high_HD.to(tl.float32)
    new_low_HD = (low_HD * cos_low_D).to(dtype).to(tl.float32) - (high_HD * sin_low_D).to(dtype).to(tl.float32)
    new_high_HD = (high_HD * cos_high_D).to(dtype).to(tl.float32) + (low_HD * sin_high_D).to(dtype).to(tl.float32)
    query_HD = query + (row * NUM_HEADS + head_H) * HEAD_DIM + d_D
    _store_halves(query_HD, new_low_HD.to(dtype), new_high_HD.to(dtype), in_half_D & is_query_H, HALF)
    key_HD = key_slots + slot * key_slot_stride + (head_H - NUM_HEADS) * HEAD_DIM + d_D
    _store_halves(key_HD, new_low_HD.to(dtype), new_high_HD.to(dtype), in_half_D & is_key_H, HALF)


def rotate_and_write(
    qkv_TF: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    slots_T: Tensor,
    key_slots_SGD: Tensor,
    value_slots_SGD: Tensor,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 0.0,
    use_pdl: bool = False,
) -> Tensor:
    """Queries with rotary embedding, [T, H, D]; writes keys (with it) and values (as they are) of all rows to their slots.

    Args:
        qkv_TF: F = (H + 2G) * D: query heads, key heads, value heads. Contiguous.
        cos_TD, sin_TD: the model's dtype; applied as q * cos + rotate_half(q) * sin with each step rounded.
        slots_T: int64, where the row's key and value go.
        key_slots_SGD, value_slots_SGD: written in place; a slot's heads lie side by side.
        q_norm_D, k_norm_D: weights of an RMS norm over each head ahead of the rotary embedding (both or neither).

    Raises:
        ValueError: shapes or layouts that the kernel does not read.
    """
    num_rows = qkv_TF.shape[0]
    if qkv_TF.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or not qkv_TF.is_contiguous() or head_dim % 2:
        raise ValueError("Rows must hold the query, key and value heads side by side, of an even head dim.")
    for slots_SGD in (key_slots_SGD, value_slots_SGD):
        if slots_SGD.shape[1:] != (num_kv_heads, head_dim) or slots_SGD.stride()[1:] != (head_dim, 1):
            raise ValueError("A slot must hold its heads side by side.")
    if cos_TD.shape != (num_rows, head_dim) or cos_TD.stride(1) != 1 or sin_TD.stride(1) != 1 or slots_T.dtype != torch.int64:
        raise ValueError("Cosines and sines must cover the whole head dim of each row, and slots be int64.")
    query_THD = torch.empty(num_rows, num_heads, head_dim, dtype=qkv_TF.dtype, device=qkv_TF.device)
    num_all = num_heads + 2 * num_kv_heads
    block_heads = min(_BLOCK_HEADS, triton.next_power_of_2(num_all))
    _rotate_and_write_kernel[(num_rows, triton.cdiv(num_all, block_heads))](
        qkv_TF,
        cos_TD,
        sin_TD,
        q_norm_D,
        k_norm_D,
        eps,
        slots_T,
        key_slots_SGD,
        value_slots_SGD,
        query_THD,
        cos_TD.stride(0),
        sin_TD.stride(0),
        key_slots_SGD.stride(0),
        value_slots_SGD.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        HAS_NORM=q_norm_D is not None,
        USE_PDL=use_pdl,
        num_warps=4,
        # a multiplication and an addition made one would skip a rounding that the modules do
        enable_fp_fusion=False,
        **launch_options(use_pdl),
    )
    return query_THD
