"""Between the QKV product and attention, in one launch: split, per-head norm, rotary embedding, keys and values to their slots."""

# Shape suffixes: T rows · F q, k and v side by side · H/G query/KV heads · D head dim · S slots

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_half_pair(low_D, high_D, cos_row, sin_row, d_D, mask_D, HALF: tl.constexpr):
    """Both halves of q * cos + rotate_half(q) * sin, each product rounded to the dtype as elementwise modules round it."""
    dtype: tl.constexpr = low_D.dtype
    cos_low_D = tl.load(cos_row + d_D, mask=mask_D, other=0.0).to(tl.float32)
    cos_high_D = tl.load(cos_row + HALF + d_D, mask=mask_D, other=0.0).to(tl.float32)
    sin_low_D = tl.load(sin_row + d_D, mask=mask_D, other=0.0).to(tl.float32)
    sin_high_D = tl.load(sin_row + HALF + d_D, mask=mask_D, other=0.0).to(tl.float32)
    low_D, high_D = low_D.to(tl.float32), high_D.to(tl.float32)
    out_low_D = (low_D * cos_low_D).to(dtype).to(tl.float32) - (high_D * sin_low_D).to(dtype).to(tl.float32)
    out_high_D = (high_D * cos_high_D).to(dtype).to(tl.float32) + (low_D * sin_high_D).to(dtype).to(tl.float32)
    return out_low_D.to(dtype), out_high_D.to(dtype)


@triton.jit
def _head_norm(low_D, high_D, weight, eps, d_D, mask_D, HALF: tl.constexpr):
    """RMS norm over one head."""
    dtype: tl.constexpr = low_D.dtype
    low_D, high_D = low_D.to(tl.float32), high_D.to(tl.float32)
    scale = tl.rsqrt((tl.sum(low_D * low_D, axis=0) + tl.sum(high_D * high_D, axis=0)) / (2 * HALF) + eps)
    weight_low_D = tl.load(weight + d_D, mask=mask_D, other=0.0).to(tl.float32)
    weight_high_D = tl.load(weight + HALF + d_D, mask=mask_D, other=0.0).to(tl.float32)
    low_D = (low_D * scale).to(dtype).to(tl.float32) * weight_low_D
    high_D = (high_D * scale).to(dtype).to(tl.float32) * weight_high_D
    return low_D.to(dtype), high_D.to(dtype)


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
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Grid: (rows, H + 2G); a program handles one head of one row."""
    HEAD_DIM: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d_D = tl.arange(0, BLOCK_HALF)
    mask_D = d_D < HALF
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = qkv + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM
    low_D = tl.load(source + d_D, mask=mask_D, other=0.0)
    high_D = tl.load(source + HALF + d_D, mask=mask_D, other=0.0)
    if head < NUM_HEADS:
        if HAS_NORM:
            low_D, high_D = _head_norm(low_D, high_D, q_norm, eps, d_D, mask_D, HALF)
        low_D, high_D = _rotate_half_pair(low_D, high_D, cos + row * cos_stride, sin + row * sin_stride, d_D, mask_D, HALF)
        target = query + (row * NUM_HEADS + head) * HEAD_DIM
        tl.store(target + d_D, low_D, mask=mask_D)
        tl.store(target + HALF + d_D, high_D, mask=mask_D)
    elif head < NUM_HEADS + NUM_KV_HEADS:
        if HAS_NORM:
            low_D, high_D = _head_norm(low_D, high_D, k_norm, eps, d_D, mask_D, HALF)
        low_D, high_D = _rotate_half_pair(low_D, high_D, cos + row * cos_stride, sin + row * sin_stride, d_D, mask_D, HALF)
        target = key_slots + tl.load(slots + row) * key_slot_stride + (head - NUM_HEADS) * HEAD_DIM
        tl.store(target + d_D, low_D, mask=mask_D)
        tl.store(target + HALF + d_D, high_D, mask=mask_D)
    else:
        target = value_slots + tl.load(slots + row) * value_slot_stride + (head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
        tl.store(target + d_D, low_D, mask=mask_D)
        tl.store(target + HALF + d_D, high_D, mask=mask_D)


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
    options = {"launch_pdl": True} if use_pdl else {}
    _rotate_and_write_kernel[(num_rows, num_heads + 2 * num_kv_heads)](
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
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        HAS_NORM=q_norm_D is not None,
        USE_PDL=use_pdl,
        num_warps=1,
        **options,
    )
    return query_THD
