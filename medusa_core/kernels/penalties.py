"""Penalties and biases on the logits of tree nodes, in place.

The reference is `medusa_core.sampling.penalties.penalize`.

Shapes: R rows, node by node for each lane · N tree nodes · P lanes of the runner · V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

_PART_LEN = 4096


@triton.jit
def _penalize_kernel(
    logits,
    lane_ptr,
    token_ptr,
    parent_ptr,
    has_penalties_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    count_ptr,
    is_prompt_ptr,
    bias_ptr,
    num_columns,
    row_stride,
    NUM_NODES: tl.constexpr,
    PART: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One part of one row. Grid (R, parts)."""
    follow_on(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.load(lane_ptr + row)
    if tl.load(has_penalties_ptr + lane) > 0:
        columns = tl.program_id(1) * PART + tl.arange(0, PART)
        is_inside = columns < num_columns
        state = lane * num_columns + columns
        logit = tl.load(logits + row * row_stride + columns, mask=is_inside, other=0.0)
        count = tl.load(count_ptr + state, mask=is_inside, other=0)
        # the drafts on the way to this node; the root is part of the output already
        node = row % NUM_NODES
        while node > 0:
            count += (columns == tl.load(token_ptr + row - row % NUM_NODES + node)).to(tl.int32)
            node = tl.load(parent_ptr + node)
        is_prompt = tl.load(is_prompt_ptr + state, mask=is_inside, other=0) != 0
        repetition = tl.load(repetition_ptr + lane)
        # rounded as torch rounds it; the plain operator is approximate
        repeated = tl.where(logit > 0, tl.math.div_rn(logit, repetition), logit * repetition)
        logit = tl.where((count > 0) | is_prompt, repeated, logit)
        logit = logit - count.to(tl.float32) * tl.load(frequency_ptr + lane)
        logit = logit - (count > 0).to(tl.float32) * tl.load(presence_ptr + lane)
        logit += tl.load(bias_ptr + state, mask=is_inside, other=0.0)
        tl.store(logits + row * row_stride + columns, logit, mask=is_inside)


def penalize_nodes(
    logits_RV: Tensor,
    *,
    lane_R: Tensor,
    token_R: Tensor,
    parent_N: Tensor,
    has_penalties_P: Tensor,
    repetition_P: Tensor,
    frequency_P: Tensor,
    presence_P: Tensor,
    count_PV: Tensor,
    is_prompt_PV: Tensor,
    bias_PV: Tensor,
    use_pdl: bool = False,
) -> None:
    """Turn logits into those that are drawn from, in place, in the rows of lanes that ask for it.

    Args:
        logits_RV: float32, contiguous along V.
        lane_R, token_R: int64, the lane of a row and the token of its node.
        parent_N: int64, the root's is -1.
        has_penalties_P (0 or 1): int64. repetition_P, frequency_P, presence_P: float32. count_PV, is_prompt_PV, bias_PV: see
            `runtime.penalty_state.PenaltyState`.
    """
    num_rows, num_columns = logits_RV.shape
    if num_rows == 0:
        return
    _penalize_kernel[(num_rows, triton.cdiv(num_columns, _PART_LEN))](
        logits_RV,
        lane_R,
        token_R,
        parent_N,
        has_penalties_P,
        repetition_P,
        frequency_P,
        presence_P,
        count_PV,
        is_prompt_PV,
        bias_PV,
        num_columns,
        logits_RV.stride(0),
        NUM_NODES=parent_N.shape[0],
        PART=_PART_LEN,
        USE_PDL=use_pdl,
        **launch_options(use_pdl),
    )
