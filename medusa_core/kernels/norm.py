"""RMS norm, with the rounding of transformers' modules: statistics in float32, value rounded before its weight multiplies it."""

# Shape suffixes: T rows · E values per row

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import launch_options


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_WEIGHT: tl.constexpr, USE_PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    mask_K = k_K < K
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_WEIGHT:
        # does not depend on the kernel before, so it is read while that one still runs
        weight_K = tl.load(weight + k_K, mask=mask_K, other=0.0)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    x_K = tl.load(x + row * K + k_K, mask=mask_K, other=0.0)
    wide_K = x_K.to(tl.float32)
    normed_K = wide_K * tl.rsqrt(tl.sum(wide_K * wide_K, axis=0) / K + eps)
    if HAS_WEIGHT:
        normed_K = normed_K.to(x_K.dtype).to(tl.float32) * weight_K.to(tl.float32)
    tl.store(out + row * K + k_K, normed_K.to(out.dtype.element_ty), mask=mask_K)


def rms_norm(x_TE: Tensor, weight_E: Tensor | None, eps: float, *, use_pdl: bool = False) -> Tensor:
    """x / rms(x), times the weight if there is one, [T, E] in x's dtype. One launch, one program per row."""
    num_rows, num_values = x_TE.shape
    out_TE = torch.empty(num_rows, num_values, dtype=x_TE.dtype, device=x_TE.device)
    _rms_norm_kernel[(num_rows,)](
        x_TE.contiguous(),
        weight_E,
        out_TE,
        eps,
        K=num_values,
        BLOCK_K=triton.next_power_of_2(num_values),
        HAS_WEIGHT=weight_E is not None,
        USE_PDL=use_pdl,
        num_warps=4 if num_values <= 2048 else 8,
        **launch_options(use_pdl),
    )
    return out_TE
