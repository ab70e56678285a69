"""Products of a few rows with a large weight: what a decode step spends its time on.

With at most 64 rows a linear layer is a matter of reading its weight once, as fast as memory gives it out, so the kernel is made of
many small programs that each stream some rows of the weight, and does whatever belongs to the product on the way: the RMS norm in
front of it, the bias, SiLU and the residual behind it.

Rounding follows the unfused modules: a norm's value is rounded before its weight multiplies it, a product before anything is added
to it. A row's result depends on the config, which fixes the order of additions, not on the rows beside it.

Shapes: T rows · E (K in the kernel) values per row · F outputs per row · B stacked weights (Medusa heads), a product each · W
slices of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.norm import row_scales
from medusa_core.kernels.pointwise import silu_rounded

# Splits are cut at multiples of this, whatever the block sizes.
_SPLIT_ALIGNMENT = 128
# Tiles of one split product at most; a counter each.
NUM_COUNTERS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class SkinnyConfig:
    """How a product is cut into programs.

    block_t, block_f: rows and outputs of a program, powers of two, at least 16.
    block_k: input values per iteration. If it covers a split's whole share, there is no loop: all loads are under way at once.
    split_k: programs that share one tile, each summing a part of the input values. Never with a gated product.
    """

    block_t: int
    block_f: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4


def split_counters(device: torch.device) -> Tensor:
    """Counters int32 [NUM_COUNTERS] for split products: zero between launches. One set per stream that launches products."""
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def _load_weight(weight, f_F, F, k_K, k_end, row_size: tl.constexpr, IS_MASKED: tl.constexpr):
    """[BLOCK_F, BLOCK_K]."""
    mask_FK = (f_F < F)[:, None]
    if IS_MASKED:
        mask_FK = mask_FK & (k_K < k_end)[None, :]
    pointers_FK = weight + f_F.to(tl.int64)[:, None] * row_size + k_K[None, :]
    return tl.load(pointers_FK, mask=mask_FK, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_slices(source, row_R, in_rows_R, k_WK, k_end, row_size: tl.constexpr, IS_MASKED: tl.constexpr, POLICY: tl.constexpr):
    """[W, rows, BLOCK_K / W], of weight rows or of x."""
    mask_WRK = in_rows_R[None, :, None]
    if IS_MASKED:
        mask_WRK = mask_WRK & (k_WK < k_end)[:, None, :]
    pointers_WRK = source + row_R.to(tl.int64)[None, :, None] * row_size + k_WK[:, None, :]
    return tl.load(pointers_WRK, mask=mask_WRK, other=0.0, eviction_policy=POLICY)


@triton.jit
def _sliced_product(
    x,
    weight,
    norm_weight,
    t_T,
    in_rows_T,
    f_F,
    F,
    k_begin,
    k_end,
    eps,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_GATED: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The whole share at once, no loop: every warp multiplies its own slice of the input values, and the slices are summed.

    All loads are under way together, which hides latency better than a pipeline of few iterations, and no two warps work on the
    same values, which they would if the tile [BLOCK_T, BLOCK_F] of 16 x 16 were what is divided among them.
    """
    SLICE: tl.constexpr = BLOCK_K // NUM_SLICES
    k_WK = k_begin + tl.arange(0, NUM_SLICES)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    up = weight + tl.cast(F, tl.int64) * K
    if USE_PDL:
        # The weight does not depend on the kernel before, so it is read while that one still runs.
        tl.extra.cuda.gdc_launch_dependents()
        w_WFK = _load_slices(weight, f_F, f_F < F, k_WK, k_end, K, IS_MASKED, "evict_first")
        if IS_GATED:
            up_WFK = _load_slices(up, f_F, f_F < F, k_WK, k_end, K, IS_MASKED, "evict_first")
        tl.extra.cuda.gdc_wait()
        x_WTK = _load_slices(x, t_T, in_rows_T, k_WK, k_end, K, IS_MASKED, "")
    else:
        x_WTK = _load_slices(x, t_T, in_rows_T, k_WK, k_end, K, IS_MASKED, "")
        w_WFK = _load_slices(weight, f_F, f_F < F, k_WK, k_end, K, IS_MASKED, "evict_first")
        if IS_GATED:
            up_WFK = _load_slices(up, f_F, f_F < F, k_WK, k_end, K, IS_MASKED, "evict_first")
    if HAS_NORM:
        if IS_SPLIT:
            scale_T = row_scales(x, t_T, in_rows_T, eps, K, BLOCK_T, BLOCK_K)
        else:
            wide_WTK = x_WTK.to(tl.float32)
            scale_T = tl.rsqrt(tl.sum(tl.sum(wide_WTK * wide_WTK, axis=2), axis=0) / K + eps)
        norm_WK = tl.load(norm_weight + k_WK, mask=k_WK < k_end, other=0.0)
        rounded_WTK = (x_WTK.to(tl.float32) * scale_T[None, :, None]).to(x_WTK.dtype)
        x_WTK = (rounded_WTK.to(tl.float32) * norm_WK.to(tl.float32)[:, None, :]).to(x_WTK.dtype)
    acc_TF = tl.sum(tl.dot(x_WTK, tl.permute(w_WFK, (0, 2, 1))), axis=0)
    up_TF = acc_TF
    if IS_GATED:
        up_TF = tl.sum(tl.dot(x_WTK, tl.permute(up_WFK, (0, 2, 1))), axis=0)
    return acc_TF, up_TF


@triton.jit
def _looped_product(
    x,
    weight,
    norm_weight,
    t_T,
    in_rows_T,
    f_F,
    F,
    k_begin,
    k_end,
    eps,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A pipeline over the input values, for more rows than registers hold at once and for large weights."""
    acc_TF = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
    up_TF = acc_TF
    up = weight + tl.cast(F, tl.int64) * K
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if HAS_NORM:
        scale_T = row_scales(x, t_T, in_rows_T, eps, K, BLOCK_T, BLOCK_K)
    for offset in range(0, SPLIT_SIZE, BLOCK_K):
        k_K = k_begin + offset + tl.arange(0, BLOCK_K)
        mask_TK = in_rows_T[:, None]
        if IS_MASKED:
            mask_TK = mask_TK & (k_K < k_end)[None, :]
        x_TK = tl.load(x + t_T.to(tl.int64)[:, None] * K + k_K[None, :], mask=mask_TK, other=0.0)
        if HAS_NORM:
            norm_K = tl.load(norm_weight + k_K, mask=k_K < k_end, other=0.0)
            rounded_TK = (x_TK.to(tl.float32) * scale_T[:, None]).to(x_TK.dtype)
            x_TK = (rounded_TK.to(tl.float32) * norm_K.to(tl.float32)[None, :]).to(x_TK.dtype)
        acc_TF = tl.dot(x_TK, tl.trans(_load_weight(weight, f_F, F, k_K, k_end, K, IS_MASKED)), acc_TF)
        if IS_GATED:
            up_TF = tl.dot(x_TK, tl.trans(_load_weight(up, f_F, F, k_K, k_end, K, IS_MASKED)), up_TF)
    return acc_TF, up_TF


@triton.jit(do_not_specialize=["T", "eps"])
def _skinny_kernel(
    x,
    weight,
    bias,
    norm_weight,
    residual,
    out,
    partials,
    counters,
    T,
    F,
    eps,
    x_batch_stride,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
    NUM_SLICES: tl.constexpr,
):
    """One program: rows [BLOCK_T] times outputs [BLOCK_F] of one stacked weight, over one split of the input values.

    Grid: (tiles of outputs, splits, tiles of rows * stacked weights). EPILOGUE is what follows the product y (bias included):
    "plain" y · "residual" residual + y · "gated" silu(y) * y', y' from weight rows F.. 2F · "block" x + silu(y), K = F.
    """
    num_row_tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(2) // num_row_tiles).to(tl.int64)
    t_T = (tl.program_id(2) % num_row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_rows_T = t_T < T
    k_begin = tl.program_id(1) * SPLIT_SIZE
    k_end = tl.minimum(k_begin + SPLIT_SIZE, K)
    IS_GATED: tl.constexpr = EPILOGUE == "gated"
    IS_MASKED: tl.constexpr = (SPLIT_SIZE * SPLIT_K != K) or (SPLIT_SIZE % BLOCK_K != 0)
    x += batch * x_batch_stride
    weight += batch * F * K

    if BLOCK_K >= SPLIT_SIZE:
        acc_TF, up_TF = _sliced_product(
            x,
            weight,
            norm_weight,
            t_T,
            in_rows_T,
            f_F,
            F,
            k_begin,
            k_end,
            eps,
            K,
            BLOCK_T,
            BLOCK_K,
            NUM_SLICES,
            IS_MASKED,
            HAS_NORM,
            SPLIT_K > 1,
            IS_GATED,
            USE_PDL,
        )
    else:
        acc_TF, up_TF = _looped_product(
            x,
            weight,
            norm_weight,
            t_T,
            in_rows_T,
            f_F,
            F,
            k_begin,
            k_end,
            eps,
            K,
            BLOCK_T,
            BLOCK_F,
            BLOCK_K,
            SPLIT_SIZE,
            IS_MASKED,
            HAS_NORM,
            IS_GATED,
            USE_PDL,
        )

    mask_TF = in_rows_T[:, None] & (f_F < F)[None, :]
    offset_TF = (batch * T + t_T.to(tl.int64))[:, None] * F + f_F[None, :]
    if SPLIT_K > 1:
        # The last program of a tile to arrive adds the partial sums up, in the order of the splits whoever came last.
        split_stride = tl.num_programs(2).to(tl.int64) // num_row_tiles * T * F
        tl.store(partials + tl.program_id(1) * split_stride + offset_TF, acc_TF, mask=mask_TF)
        # All threads' stores come before the one thread that counts.
        tl.debug_barrier()
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        num_before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        is_last = num_before == SPLIT_K - 1
        if is_last:
            acc_TF = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
            for split in range(SPLIT_K):
                # past the first-level cache, which knows nothing of other processors' stores
                acc_TF += tl.load(partials + split * split_stride + offset_TF, mask=mask_TF, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
            _finish(x, bias, residual, out, acc_TF, up_TF, batch, t_T, f_F, F, offset_TF, mask_TF, K, HAS_BIAS, EPILOGUE)
    else:
        _finish(x, bias, residual, out, acc_TF, up_TF, batch, t_T, f_F, F, offset_TF, mask_TF, K, HAS_BIAS, EPILOGUE)


@triton.jit
def _finish(
    x,
    bias,
    residual,
    out,
    acc_TF,
    up_TF,
    batch,
    t_T,
    f_F,
    F,
    offset_TF,
    mask_TF,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Bias, activation, residual; stores in the output's dtype."""
    if HAS_BIAS:
        acc_TF += tl.load(bias + batch * F + f_F, mask=f_F < F, other=0.0).to(tl.float32)[None, :]
    model_dtype: tl.constexpr = x.dtype.element_ty
    if EPILOGUE == "gated":
        gate_TF = silu_rounded(acc_TF.to(model_dtype))
        acc_TF = gate_TF.to(tl.float32) * up_TF.to(model_dtype).to(tl.float32)
    elif EPILOGUE == "residual":
        residual_TF = tl.load(residual + offset_TF, mask=mask_TF, other=0.0)
        acc_TF = residual_TF.to(tl.float32) + acc_TF.to(model_dtype).to(tl.float32)
    elif EPILOGUE == "block":
        x_TF = tl.load(x + t_T.to(tl.int64)[:, None] * K + f_F[None, :], mask=mask_TF, other=0.0)
        acc_TF = x_TF.to(tl.float32) + silu_rounded(acc_TF.to(model_dtype)).to(tl.float32)
    tl.store(out + offset_TF, acc_TF.to(out.dtype.element_ty), mask=mask_TF)


def skinny_product(
    x: Tensor,
    weight: Tensor,
    config: SkinnyConfig,
    *,
    out: Tensor,
    epilogue: str = "plain",
    bias: Tensor | None = None,
    norm_weight_E: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    counters: Tensor | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """Launch one product; see `medusa_core.kernels.linear` for the products of a model.

    Args:
        x: [T, E] or [B, T, E], contiguous rows; a batch may be an expanded view. 16-bit.
        weight: [F, E], [2F, E] for the gated epilogue or [B, F, E], contiguous, x's dtype. bias: [F] or [B, F].
        out: [T, F] or [B, T, F], contiguous, written. Its dtype is the one results are stored in.
        counters: from `split_counters`; needed if the config splits. Zero again when the launch is done.
        use_pdl: launch while the kernel before still runs (programmatic dependent launch, sm_90 and later).

    Returns:
        out.

    Raises:
        ValueError: a tensor is laid out otherwise, or the counters do not suffice.
    """
    num_batch, num_rows, num_outputs = out.shape if out.dim() == 3 else (1, *out.shape)
    num_inputs = x.shape[-1]
    has_plain_rows = x.stride(-1) == 1 and (num_rows == 1 or x.stride(-2) == num_inputs)
    if not (has_plain_rows and weight.is_contiguous() and out.is_contiguous()):
        raise ValueError("A skinny product needs contiguous rows.")
    split_size = -(-triton.cdiv(num_inputs, config.split_k) // _SPLIT_ALIGNMENT) * _SPLIT_ALIGNMENT
    split_k = triton.cdiv(num_inputs, split_size)
    if split_k == 1:
        split_size = num_inputs
    grid = (triton.cdiv(num_outputs, config.block_f), split_k, triton.cdiv(num_rows, config.block_t) * num_batch)
    partials = out
    if split_k > 1:
        if epilogue == "gated" or counters is None or grid[0] * grid[2] > counters.numel():
            raise ValueError("A split product needs a counter per tile, and cannot be gated.")
        partials = torch.empty((split_k, *out.shape), dtype=torch.float32, device=out.device)
    options = {"launch_pdl": True} if use_pdl else {}
    _skinny_kernel[grid](
        x,
        weight,
        bias,
        norm_weight_E,
        residual,
        out,
        partials,
        counters,
        num_rows,
        num_outputs,
        eps,
        x.stride(0) if x.dim() == 3 else 0,
        K=num_inputs,
        BLOCK_T=config.block_t,
        BLOCK_F=config.block_f,
        BLOCK_K=config.block_k,
        SPLIT_K=split_k,
        SPLIT_SIZE=split_size,
        HAS_NORM=norm_weight_E is not None,
        HAS_BIAS=bias is not None,
        EPILOGUE=epilogue,
        USE_PDL=use_pdl,
        NUM_SLICES=min(config.num_warps, config.block_k // 16),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    return out
