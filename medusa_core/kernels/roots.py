"""What heads draft from, read from lane state: the hidden state before each lane's root, and the root's token.

The reference is runtime/runner.py, which does the same in torch.

Shapes: B lanes of the step · P lanes of the runner · L tokens · E hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options


@triton.jit
def _roots_kernel(
    lane_ptr,
    num_known,
    tokens,
    tokens_stride,
    lane_hidden,
    out_hidden,
    out_root,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One lane. Grid (B,)."""
    follow_on(USE_PDL)
    b = tl.program_id(0).to(tl.int64)
    lane = tl.load(lane_ptr + b)
    e_E = tl.arange(0, BLOCK_E)
    hidden_E = tl.load(lane_hidden + lane * E + e_E, mask=e_E < E)
    tl.store(out_hidden + b * E + e_E, hidden_E, mask=e_E < E)
    tl.store(out_root + b, tl.load(tokens + lane * tokens_stride + tl.load(num_known + lane) - 1))


def gather_roots(
    lane_B: Tensor, *, num_known_P: Tensor, tokens_PL: Tensor, hidden_PE: Tensor, use_pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """What is drafted from, of the lanes in lane_B: the hidden states [B, E], and the roots' tokens, int64 [B]."""
    num_lanes, hidden_size = lane_B.shape[0], hidden_PE.shape[1]
    hidden_BE = hidden_PE.new_empty(num_lanes, hidden_size)
    root_B = torch.empty_like(lane_B)
    _roots_kernel[(num_lanes,)](
        lane_B,
        num_known_P,
        tokens_PL,
        tokens_PL.stride(0),
        hidden_PE,
        hidden_BE,
        root_B,
        E=hidden_size,
        BLOCK_E=triton.next_power_of_2(hidden_size),
        USE_PDL=use_pdl,
        **launch_options(use_pdl),
    )
    return hidden_BE, root_B
