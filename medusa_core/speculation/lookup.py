"""Prompt lookup: drafts what came behind an earlier place of the text that reads like its end.

It costs no weights, and it is right where the text repeats itself: quotes, edits, summaries, code. The place is the one with the
longest match up to and including the root, counted up to MAX_MATCH_LEN tokens, the latest among equals; so a single token that
appeared before is enough, which emits more on Spec-Bench's prompts than asking for two or three (docs/heads.md). What follows the
place is drafted, over and over where that reaches the end of the text. The kernel is kernels/lookup.py.

Source of the idea: prompt lookup decoding (Saxena, 2023).

Shapes: B lanes · P lanes of the runner · L tokens · D drafted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_MATCH_LEN = 8


def lookup_tokens(tokens_PL: Tensor, index_B: Tensor, num_known_B: Tensor, depth: int) -> Tensor:
    """What the text suggests behind each lane's last known token, int64 [B, D]; that token itself where it appears nowhere before.

    Args:
        tokens_PL: int64; of row index_B[b], the first num_known_B[b] (at least 1) are known, and no others are read.
        depth: D.
    """
    # counting the longest on a GPU would wait for it
    width = int(num_known_B.max()) if tokens_PL.device.type == "cpu" else tokens_PL.shape[1]
    tokens_BL = tokens_PL[index_B, :width]
    base_B1 = num_known_B.unsqueeze(1) - 1
    place_L = torch.arange(width, device=tokens_PL.device)
    is_match_BL = place_L < base_B1
    match_len_BL = torch.zeros_like(tokens_BL)
    for distance in range(MAX_MATCH_LEN):
        suffix_B1 = tokens_BL.gather(1, (base_B1 - distance).clamp(min=0))
        is_match_BL = is_match_BL & (place_L >= distance) & (tokens_BL.roll(distance, dims=1) == suffix_B1)
        match_len_BL += is_match_BL
    best_len_B1, place_B1 = (match_len_BL * width + place_L).max(dim=1, keepdim=True)
    period_B1 = (base_B1 - place_B1).clamp(min=1)
    source_BD = place_B1 + 1 + torch.arange(depth, device=tokens_PL.device) % period_B1
    found_BD = tokens_BL.gather(1, source_BD.clamp(max=width - 1))
    return torch.where(best_len_B1 >= width, found_BD, tokens_BL.gather(1, base_B1))
