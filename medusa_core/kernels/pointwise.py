"""Elementwise kernels around products."""

# Shape suffixes: T rows · I outputs of the gated product

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import launch_options

_BLOCK = 1024


@triton.jit
def silu(x):
    """x * sigmoid(x), of float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_mul_kernel(gate_up, out, num_outputs, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # [I, 2]: gate and up alternate
    pointers_I2 = gate_up + row * 2 * num_outputs + i_I[:, None] * 2 + tl.arange(0, 2)[None, :]
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate_I, up_I = tl.split(tl.load(pointers_I2, mask=(i_I < num_outputs)[:, None], other=0.0).to(tl.float32))
    tl.store(out + row * num_outputs + i_I, (silu(gate_I) * up_I).to(out.dtype.element_ty), mask=i_I < num_outputs)


def silu_mul(gate_up_T2I: Tensor, *, use_pdl: bool = False) -> Tensor:
    """silu(gate) * up, [T, I], of rows in which gate and up alternate; contiguous, any float dtype. Rounded once."""
    num_rows, width = gate_up_T2I.shape
    out_TI = torch.empty(num_rows, width // 2, dtype=gate_up_T2I.dtype, device=gate_up_T2I.device)
    _silu_mul_kernel[(num_rows, triton.cdiv(width // 2, _BLOCK))](
        gate_up_T2I.contiguous(), out_TI, width // 2, BLOCK=_BLOCK, USE_PDL=use_pdl, **launch_options(use_pdl)
    )
    return out_TI
