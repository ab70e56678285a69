"""Prompt lookup in one launch: where an earlier part of a lane's text reads like its end.

The reference is speculation/lookup.py. Programs share a lane's tokens and each leaves the best match of its part as a key; whoever
needs the match takes the largest (kernels/tree_step.py), so nothing has to be cleared before or merged behind.

Shapes: B lanes of the step · P lanes of the runner · L tokens · J keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

# Tokens that a program reads at once, and most programs per lane.
_BLOCK_LEN = 2048
_MAX_PARTS = 32


@triton.jit
def _match_kernel(
    lane_ptr,
    num_known,
    num_prompt,
    num_predicted,
    tokens,
    tokens_stride,
    first_prediction,
    out_key,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_MATCH_LEN: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Best match of NUM_BLOCKS * BLOCK tokens: (length << 32) + place of its last token, 0 if there is none. Grid (B, J)."""
    follow_on(USE_PDL)
    b = tl.program_id(0).to(tl.int64)
    lane = tl.load(lane_ptr + b)
    base = tl.load(num_known + lane) - 1
    # The last predicted token has nothing behind it.
    end = first_prediction + tl.load(num_predicted + lane) - 1
    is_first_output = base == tl.load(num_prompt + lane)
    text = tokens + lane * tokens_stride
    begin = tl.program_id(1) * (NUM_BLOCKS * BLOCK)
    best = tl.zeros([BLOCK], tl.int64)
    root = tl.load(text + base)
    for block in range(NUM_BLOCKS):
        start = begin + block * BLOCK
        if (start < base) | ((start + BLOCK > first_prediction) & (start < end)):
            place = start + tl.arange(0, BLOCK)
            is_predicted = place >= first_prediction
            is_there = (place < base) | (is_predicted & (place < end))
            is_first = (tl.load(text + place, mask=is_there, other=-1) == root) & is_there
            # tokens in front of it, in its own text
            num_before = tl.where(is_predicted, place - first_prediction, place)
            length = is_first.to(tl.int64)
            is_match = is_first
            # all loads at once, at the few places where the last token matches
            for distance in tl.static_range(1, MAX_MATCH_LEN):
                is_inside = is_first & (num_before >= distance)
                is_equal = tl.load(text + place - distance, mask=is_inside, other=-1) == tl.load(
                    text + base - distance, mask=base >= distance, other=-2
                )
                is_match = is_match & is_inside & is_equal
                length += is_match.to(tl.int64)
            # An output that begins as predicted goes on so, whatever else reads like it.
            length = tl.where(is_first_output & (place == first_prediction), MAX_MATCH_LEN + 1, length)
            best = tl.maximum(best, tl.where(is_first, (length << 32) + place, 0))
    tl.store(out_key + b * tl.num_programs(1) + tl.program_id(1), tl.max(best))


def match_suffixes(
    lane_B: Tensor,
    *,
    num_known_P: Tensor,
    num_prompt_P: Tensor,
    num_predicted_P: Tensor,
    tokens_PL: Tensor,
    first_prediction: int,
    max_match_len: int,
    use_pdl: bool = False,
) -> Tensor:
    """Keys of the best matches of the lanes in lane_B, int64 [B, J]; a lane's largest is its best.

    A key is (length << 32) + place: the `length` tokens up to `place` are the last ones known, and `place` lies before these or in
    the prediction; 0 where nothing matches. Lengths are counted up to max_match_len.

    Args:
        num_known_P, num_prompt_P, num_predicted_P: int64.
        tokens_PL: int64, contiguous along L; a lane's predicted tokens are in the columns from `first_prediction` on.
    """
    num_lanes, max_len = lane_B.shape[0], tokens_PL.shape[1]
    num_blocks = triton.cdiv(max_len, _MAX_PARTS * _BLOCK_LEN)
    num_parts = triton.cdiv(max_len, num_blocks * _BLOCK_LEN)
    key_BJ = torch.empty(num_lanes, num_parts, dtype=torch.int64, device=lane_B.device)
    _match_kernel[(num_lanes, num_parts)](
        lane_B,
        num_known_P,
        num_prompt_P,
        num_predicted_P,
        tokens_PL,
        tokens_PL.stride(0),
        first_prediction,
        key_BJ,
        NUM_BLOCKS=num_blocks,
        BLOCK=min(_BLOCK_LEN, triton.next_power_of_2(max_len)),
        MAX_MATCH_LEN=max_match_len,
        USE_PDL=use_pdl,
        num_warps=8,
        **launch_options(use_pdl),
    )
    return key_BJ
