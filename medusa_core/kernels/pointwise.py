"""Elementwise kernels around products."""

# Shape suffixes: T rows · I outputs of the gated product

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def silu_rounded(x):
    """x * sigmoid(x), computed in float32 and rounded to x's dtype."""
    wide = x.to(tl.float32)
    return (wide / (1.0 + tl.exp(-wide))).to(x.dtype)


@triton.jit
def _silu_mul_kernel(gate_up, out, num_outputs, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_I = i_I < num_outputs
    gate_I = tl.load(gate_up + row * 2 * num_outputs + i_I, mask=mask_I, other=0.0)
    up_I = tl.load(gate_up + row * 2 * num_outputs + num_outputs + i_I, mask=mask_I, other=0.0)
    product_I = silu_rounded(gate_I).to(tl.float32) * up_I.to(tl.float32)
    tl.store(out + row * num_outputs + i_I, product_I.to(out.dtype.element_ty), mask=mask_I)


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up, [T, I], of rows that hold gate and up side by side; contiguous, any float dtype."""
    num_rows, width = gate_up_T2I.shape
    out_TI = torch.empty(num_rows, width // 2, dtype=gate_up_T2I.dtype, device=gate_up_T2I.device)
    _silu_mul_kernel[(num_rows, triton.cdiv(width // 2, _BLOCK))](gate_up_T2I.contiguous(), out_TI, width // 2, BLOCK=_BLOCK)
    return out_TI
