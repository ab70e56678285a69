"""Products of a few rows with a large weight: what a decode step spends its time on.

With at most 64 rows a linear layer is a matter of reading its weight once, as fast as memory gives it out, so the kernel is made of
many small programs that each stream some rows of the weight, and does whatever belongs to the product on the way: the RMS norm in
front of it, the bias, the gate or the residual behind it. All of it happens on the float32 sums, which are rounded once.

A row's result depends on the config, which fixes the order of additions, not on the rows beside it.

Shapes: T rows · E (K in the kernel) values per row · F rows of the weight · B stacked weights (Medusa heads), a product each · W
slices of the values · J keys per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.pointwise import silu
from medusa_core.kernels.support import launch_options
from medusa_core.kernels.topk import EMPTY, pack

# Splits are cut at multiples of this, whatever the block sizes.
_SPLIT_ALIGNMENT = 128
# Tiles of one split product at most; a counter each.
NUM_COUNTERS = 8192
# A program that also takes the norm holds its rows whole.
_MAX_NORM_ROWS = 16
_MAX_NORM_INPUTS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class SkinnyConfig:
    """How a product is cut into programs.

    block_t, block_f: rows of x and of the weight of a program, powers of two, at least 16.
    block_k: input values per iteration. If it covers a split's whole share, there is no loop: all loads are under way at once.
    split_k: programs that share one tile, each summing a part of the input values. Never with a gated product.
    prefetch: with overlapped launches, a looping program calls its part of the weight to the second-level cache before it waits.
    """

    block_t: int
    block_f: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: bool = True

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program, for 16-bit values; weights of 8 bits need less."""
        return (self.block_t + self.block_f) * self.block_k * 2 * self.num_stages

    def can_take_norm(self, num_inputs: int) -> bool:
        """Whether the RMS norm in front of the product can be part of it."""
        return self.block_t <= _MAX_NORM_ROWS and self.split_k == 1 and num_inputs <= _MAX_NORM_INPUTS


def split_counters(device: torch.device) -> Tensor:
    """Counters int32 [NUM_COUNTERS] for split products: zero between launches. One set per stream that launches products."""
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def _prefetch_rows(first, num_rows, row_bytes, num_bytes):
    """Ask for `num_bytes` of each of so many rows in the second-level cache: a thread a row, nobody waits."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred is_row;
            .reg .u32 row;
            .reg .u64 address;
            mov.u32 row, %tid.x;
            setp.lt.u32 is_row, row, $2;
            mad.wide.u32 address, row, $3, $1;
            @is_row cp.async.bulk.prefetch.L2.global [address], $4;
            mov.u32 $0, 0;
        }""",
        "=r,l,r,r,r",
        [first, num_rows, row_bytes, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_slices(source, row_R, in_rows_R, k_WK, k_end, row_size: tl.constexpr, IS_MASKED: tl.constexpr, POLICY: tl.constexpr):
    """[W, rows, BLOCK_K / W], of weight rows or of x."""
    mask_WRK = in_rows_R[None, :, None]
    if IS_MASKED:
        mask_WRK = mask_WRK & (k_WK < k_end)[:, None, :]
    pointers_WRK = source + row_R.to(tl.int64)[None, :, None] * row_size + k_WK[:, None, :]
    return tl.load(pointers_WRK, mask=mask_WRK, other=0.0, eviction_policy=POLICY)


@triton.jit
def _load_tile(source, row_R, in_rows_R, k_K, k_end, row_size: tl.constexpr, IS_MASKED: tl.constexpr, POLICY: tl.constexpr):
    """[rows, BLOCK_K], of weight rows or of x."""
    mask_RK = in_rows_R[:, None]
    if IS_MASKED:
        mask_RK = mask_RK & (k_K < k_end)[None, :]
    return tl.load(source + row_R.to(tl.int64)[:, None] * row_size + k_K[None, :], mask=mask_RK, other=0.0, eviction_policy=POLICY)


@triton.jit
def _squares(x, AXIS: tl.constexpr):
    """Float32 sums of squares over the last dimension, AXIS."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=AXIS)


@triton.jit
def _finish_split(out, partials, counters, acc_TF, offset_TF, mask_TF, split_stride, SPLIT_K: tl.constexpr):
    """The last program of a tile to arrive adds the partial sums up, in the order of the splits whoever came last."""
    tl.store(partials + tl.program_id(1) * split_stride + offset_TF, acc_TF, mask=mask_TF)
    # All threads' stores come before the one thread that counts.
    tl.debug_barrier()
    counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    num_before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    is_last = num_before == SPLIT_K - 1
    if is_last:
        # Past the first-level cache, which knows nothing of other processors' stores; unrolled, so that all loads are under way
        # together.
        acc_TF = tl.load(partials + offset_TF, mask=mask_TF, other=0.0, cache_modifier=".cg")
        for split in tl.static_range(1, SPLIT_K):
            acc_TF += tl.load(partials + split * split_stride + offset_TF, mask=mask_TF, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
        tl.store(out + offset_TF, acc_TF.to(out.dtype.element_ty), mask=mask_TF)


@triton.jit
def _store_gated(out, acc_TF, t_T, in_rows_T, F, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """silu(gate) * up of the pairs of a tile."""
    gate_TI, up_TI = tl.split(tl.reshape(acc_TF, [BLOCK_T, BLOCK_F // 2, 2]))
    i_I = tl.program_id(0) * (BLOCK_F // 2) + tl.arange(0, BLOCK_F // 2)
    pointers_TI = out + t_T.to(tl.int64)[:, None] * (F // 2) + i_I[None, :]
    mask_TI = in_rows_T[:, None] & (i_I < F // 2)[None, :]
    tl.store(pointers_TI, (silu(gate_TI) * up_TI).to(out.dtype.element_ty), mask=mask_TI)


@triton.jit
def _store_best(out, acc_TF, t_T, in_rows_T, in_outputs_F, BLOCK_F: tl.constexpr):
    """The key (`topk.pack`) of each row's largest output within a tile, the first among equals; NaN counts as -inf."""
    # `tl.max` is not defined for NaN
    value_TF = tl.where(in_outputs_F[None, :] & (acc_TF == acc_TF), acc_TF, float("-inf"))
    value_T, column_T = tl.max(value_TF, axis=1, return_indices=True)
    pointers_T = out + t_T.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(pointers_T, pack(value_T, tl.program_id(0) * BLOCK_F + column_T), mask=in_rows_T)


@triton.jit
def _store_top(out, acc_TF, t_T, f_F, in_rows_T, in_outputs_F, TILE_KEYS: tl.constexpr):
    """The keys (`topk.pack`) of each row's largest outputs within a tile, best first; outputs that do not exist come last."""
    key_TF = tl.where(in_outputs_F[None, :], pack(acc_TF, f_F[None, :] + tl.zeros_like(acc_TF).to(tl.int32)), EMPTY)
    pointers_T = out + (t_T.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * TILE_KEYS
    for place in tl.static_range(TILE_KEYS):
        best_T = tl.max(key_TF, axis=1)
        tl.store(pointers_T + place, best_T, mask=in_rows_T)
        key_TF = tl.where(key_TF == best_T[:, None], EMPTY, key_TF)


@triton.jit(do_not_specialize=["T", "eps"])
def _skinny_kernel(  # noqa: C901 - one branch each of a few variants, all decided when it is compiled
    x,
    weight,
    scale,
    bias,
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
    BLOCK_ROW: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """One program: rows [BLOCK_T] times outputs [BLOCK_F] of one stacked weight, over one split of the input values.

    Grid: (tiles of outputs, splits, tiles of rows * stacked weights). EPILOGUE is what follows the product y (norm and bias
    included): "plain" y · "residual" residual + y · "gated" silu(y[2i]) * y[2i + 1] · "block" x + silu(y), K = F · "best" the
    largest of a tile, as a key · "top" the TILE_KEYS largest of a tile, as keys.

    With HAS_SCALE the weight is of 8 bits, and a row of it counts times its scale. Such weights are the draft heads', which each
    level of a tree reads again, so they may stay in the second-level cache; the model's are read once a step.

    A share that one block covers is taken at once: every warp multiplies its own slice of the input values, and the slices are
    summed. All loads are under way together, which hides latency better than a pipeline of few iterations, and no two warps work
    on the same values. A longer share is a pipeline; from memory to the tensor cores, nothing is done with its values.
    """
    num_row_tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(2) // num_row_tiles).to(tl.int64)
    t_T = (tl.program_id(2) % num_row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_rows_T = t_T < T
    in_outputs_F = f_F < F
    k_begin = tl.program_id(1) * SPLIT_SIZE
    k_end = tl.minimum(k_begin + SPLIT_SIZE, K)
    IS_SLICED: tl.constexpr = BLOCK_K >= SPLIT_SIZE
    IS_MASKED: tl.constexpr = (SPLIT_SIZE * SPLIT_K != K) or (SPLIT_SIZE % BLOCK_K != 0)
    SLICE: tl.constexpr = BLOCK_K // NUM_SLICES
    x += batch * x_batch_stride
    weight += batch * F * K
    POLICY: tl.constexpr = "evict_last" if HAS_SCALE else "evict_first"
    WEIGHT_BYTES: tl.constexpr = 1 if HAS_SCALE else 2
    mask_TF = in_rows_T[:, None] & in_outputs_F[None, :]
    offset_TF = (batch * T + t_T.to(tl.int64))[:, None] * F + f_F[None, :]

    # What does not depend on the kernel before is read while that one still runs: the weight, and the bias.
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if IS_SLICED:
        k_WK = k_begin + tl.arange(0, NUM_SLICES)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
        w_WFK = _load_slices(weight, f_F, in_outputs_F, k_WK, k_end, K, IS_MASKED, POLICY)
    elif PREFETCH:
        f_begin = tl.program_id(0) * BLOCK_F
        first = weight + f_begin.to(tl.int64) * K + k_begin
        _prefetch_rows(first, tl.minimum(F - f_begin, BLOCK_F), K * WEIGHT_BYTES, (k_end - k_begin) * WEIGHT_BYTES)
    if HAS_SCALE:
        scale_F = tl.load(scale + f_F, mask=in_outputs_F, other=0.0)
    if HAS_BIAS:
        bias_F = tl.load(bias + batch * F + f_F, mask=in_outputs_F, other=0.0).to(tl.float32)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()

    # asked for before the product, needed behind it
    if EPILOGUE == "residual":
        # a split product adds it with its first part
        residual_TF = tl.load(residual + offset_TF, mask=mask_TF & (tl.program_id(1) == 0), other=0.0)
    elif EPILOGUE == "block":
        residual_TF = tl.load(x + t_T.to(tl.int64)[:, None] * K + f_F[None, :], mask=mask_TF, other=0.0)
    if HAS_NORM and not IS_SLICED:
        row_K = tl.arange(0, BLOCK_ROW)
        x_TR = _load_tile(x, t_T, in_rows_T, row_K, K, K, BLOCK_ROW != K, "")

    if IS_SLICED:
        x_WTK = _load_slices(x, t_T, in_rows_T, k_WK, k_end, K, IS_MASKED, "")
        acc_TF = tl.sum(tl.dot(x_WTK, tl.permute(w_WFK.to(x.dtype.element_ty), (0, 2, 1))), axis=0)
    else:
        acc_TF = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
        for offset in range(0, SPLIT_SIZE, BLOCK_K):
            k_K = k_begin + offset + tl.arange(0, BLOCK_K)
            x_TK = _load_tile(x, t_T, in_rows_T, k_K, k_end, K, IS_MASKED, "")
            w_FK = _load_tile(weight, f_F, in_outputs_F, k_K, k_end, K, IS_MASKED, POLICY)
            acc_TF = tl.dot(x_TK, tl.trans(w_FK.to(x.dtype.element_ty)), acc_TF)

    if HAS_SCALE:
        acc_TF *= scale_F[None, :]
    if HAS_NORM:
        # rms_norm(x) W = x W / rms(x): the norm's own weight is in W already
        square_T = tl.sum(_squares(x_WTK, 2), axis=0) if IS_SLICED else _squares(x_TR, 1)
        acc_TF *= tl.rsqrt(square_T / K + eps)[:, None]
    if HAS_BIAS:
        if SPLIT_K > 1:
            bias_F = tl.where(tl.program_id(1) == 0, bias_F, 0.0)
        acc_TF += bias_F[None, :]
    if EPILOGUE == "residual":
        acc_TF += residual_TF.to(tl.float32)
    elif EPILOGUE == "block":
        acc_TF = residual_TF.to(tl.float32) + silu(acc_TF)

    if SPLIT_K > 1:
        split_stride = tl.num_programs(2).to(tl.int64) // num_row_tiles * T * F
        _finish_split(out, partials, counters, acc_TF, offset_TF, mask_TF, split_stride, SPLIT_K)
    elif EPILOGUE == "gated":
        _store_gated(out, acc_TF, t_T, in_rows_T, F, BLOCK_T, BLOCK_F)
    elif EPILOGUE == "top":
        _store_top(out, acc_TF, t_T, f_F, in_rows_T, in_outputs_F, TILE_KEYS)
    elif EPILOGUE == "best":
        _store_best(out, acc_TF, t_T, in_rows_T, in_outputs_F, BLOCK_F)
    else:
        tl.store(out + offset_TF, acc_TF.to(out.dtype.element_ty), mask=mask_TF)


def skinny_product(
    x: Tensor,
    weight: Tensor,
    config: SkinnyConfig,
    *,
    out: Tensor,
    epilogue: str = "plain",
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
    residual: Tensor | None = None,
    counters: Tensor | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """Launch one product; see `medusa_core.kernels.linear` for the products of a model.

    Args:
        x: [T, E] or [B, T, E], contiguous rows; a batch may be an expanded view. 16-bit.
        weight: [F, E] or [B, F, E], contiguous, x's dtype; or int8 [F, E] with a `scale`, float32 [F]. bias: [F] or [B, F]. For the
            gated epilogue gate and up alternate.
        out: [T, F], [T, F / 2] if gated, or [B, T, F], contiguous, written. Its dtype is the one results are stored in. For the
            epilogue "best": int64 [T, tiles of outputs], see `topk.best_of_keys`; for "top" int64 [T, J], some keys of each tile.
        norm_eps: divide x by its root mean square, with this epsilon, if the config can take the norm.
        counters: from `split_counters`; needed if the config splits. Zero again when the launch is done.
        use_pdl: launch while the kernel before still runs (programmatic dependent launch, sm_90 and later).

    Returns:
        out.

    Raises:
        ValueError: a tensor is laid out otherwise, the counters do not suffice, or the config does not go with the product.
    """
    num_batch, num_rows = (out.shape[0], out.shape[1]) if out.dim() == 3 else (1, out.shape[0])
    num_outputs, num_inputs = weight.shape[-2:]
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
        if epilogue not in ("plain", "residual") or counters is None or grid[0] * grid[2] > counters.numel():
            raise ValueError("A split product needs a counter per tile, and can only be plain or add a residual.")
        partials = torch.empty((split_k, *out.shape), dtype=torch.float32, device=out.device)
    if norm_eps is not None and not config.can_take_norm(num_inputs):
        raise ValueError("This config cannot take the norm into the product.")
    _skinny_kernel[grid](
        x,
        weight,
        scale,
        bias,
        residual,
        out,
        partials,
        counters,
        num_rows,
        num_outputs,
        norm_eps or 0.0,
        x.stride(0) if x.dim() == 3 else 0,
        K=num_inputs,
        BLOCK_T=config.block_t,
        BLOCK_F=config.block_f,
        BLOCK_K=config.block_k,
        BLOCK_ROW=triton.next_power_of_2(num_inputs),
        SPLIT_K=split_k,
        SPLIT_SIZE=split_size,
        HAS_SCALE=scale is not None,
        HAS_NORM=norm_eps is not None,
        HAS_BIAS=bias is not None,
        EPILOGUE=epilogue,
        USE_PDL=use_pdl,
        # in units of 16 bytes
        PREFETCH=config.prefetch and use_pdl and num_inputs * weight.element_size() % 16 == 0,
        NUM_SLICES=min(config.num_warps, config.block_k // 16),
        TILE_KEYS=out.shape[-1] // grid[0] if epilogue == "top" else 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(use_pdl),
    )
    return out
