"""Tokens that may not be drawn become -inf in the logits, in place.

The reference is `medusa_core.sampling.token_mask.mask_tokens_`.

Shapes: R rows · V vocabulary · W words of 32 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

_PART_LEN = 4096


@triton.jit
def _mask_kernel(logits, bits, num_columns, logits_stride, bits_stride, PART: tl.constexpr, USE_PDL: tl.constexpr):
    """One part of one row. Grid (R, parts)."""
    follow_on(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * PART + tl.arange(0, PART)
    is_inside = columns < num_columns
    words = tl.load(bits + row * bits_stride + columns // 32, mask=is_inside, other=-1)
    is_banned = ((words >> (columns % 32)) & 1) == 0
    tl.store(logits + row * logits_stride + columns, float("-inf"), mask=is_inside & is_banned)


def mask_tokens_(logits_RV: Tensor, bits_RW: Tensor, *, use_pdl: bool = False) -> None:
    """Write -inf to the logits, float32 and contiguous along V, of tokens whose bit is 0. bits_RW: int32, contiguous along W."""
    num_rows, num_columns = logits_RV.shape
    if num_rows == 0:
        return
    _mask_kernel[(num_rows, triton.cdiv(num_columns, _PART_LEN))](
        logits_RV,
        bits_RW,
        num_columns,
        logits_RV.stride(0),
        bits_RW.stride(0),
        PART=_PART_LEN,
        USE_PDL=use_pdl,
        **launch_options(use_pdl),
    )
