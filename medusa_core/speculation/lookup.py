"""Prompt lookup: drafts what came behind an earlier place of the text that reads like its end.

It costs no weights, and it is right where the text repeats itself: quotes, edits, summaries, code. The place is the one with the
longest match up to and including the root, counted up to MAX_MATCH_LEN tokens, the latest among equals; so a single token that
appeared before is enough, which emits more on Spec-Bench's prompts than asking for two or three (docs/heads.md). What follows the
place is drafted, over and over where that reaches the end of the text. The kernel is kernels/lookup.py.

A caller may say what it expects the output to be, such as a file that is to be edited. That is a text to look in as well, and comes
first among equals; an output that begins as predicted goes on with it, whatever else reads like it.

Source of the idea: prompt lookup decoding (Saxena, 2023).

Shapes: B lanes · P lanes of the runner · L tokens · K predicted tokens · D drafted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_MATCH_LEN = 8
# Of a match in a prediction, so that it wins over one of equal length in the text. Behind any place.
_IS_PREDICTED = 1 << 31


@dataclass(frozen=True, slots=True)
class PredictionRows:
    """What callers expect B lanes to say. tokens_BK: int64, num_B of them per lane (0: none). num_prompt_B: tokens of prompts."""

    tokens_BK: Tensor
    num_B: Tensor
    num_prompt_B: Tensor


def lookup_tokens(
    tokens_PL: Tensor, index_B: Tensor, num_known_B: Tensor, depth: int, prediction: PredictionRows | None = None
) -> Tensor:
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
    suffix_BM = tokens_BL.gather(1, (base_B1 - torch.arange(MAX_MATCH_LEN, device=tokens_PL.device)).clamp(min=0))
    key_B1, place_B1 = _best(_match_len(tokens_BL, suffix_BM, place_L < base_B1), place_L)
    ahead_D = torch.arange(depth, device=tokens_PL.device)
    source_BD = place_B1 + 1 + ahead_D % (base_B1 - place_B1).clamp(min=1)
    found_BD = tokens_BL.gather(1, source_BD.clamp(max=width - 1))
    found_BD = torch.where(key_B1 > 0, found_BD, tokens_BL.gather(1, base_B1))
    if prediction is None:
        return found_BD
    last_B1 = prediction.num_B.unsqueeze(1) - 1
    place_K = torch.arange(prediction.tokens_BK.shape[1], device=tokens_PL.device)
    match_len_BK = _match_len(prediction.tokens_BK, suffix_BM, place_K < last_B1)
    is_start_BK = (base_B1 == prediction.num_prompt_B.unsqueeze(1)) & (place_K == 0) & (match_len_BK > 0)
    match_len_BK = torch.where(is_start_BK, MAX_MATCH_LEN + 1, match_len_BK)
    predicted_key_B1, place_B1 = _best(match_len_BK, place_K)
    # over the end, the last token again
    source_BD = torch.minimum(place_B1 + 1 + ahead_D, last_B1).clamp(min=0)
    is_better_B1 = (predicted_key_B1 > 0) & (predicted_key_B1 + _IS_PREDICTED > key_B1)
    return torch.where(is_better_B1, prediction.tokens_BK.gather(1, source_BD), found_BD)


def _match_len(tokens_BX: Tensor, suffix_BM: Tensor, is_place_BX: Tensor) -> Tensor:
    """How many tokens up to each place are the last ones known, counted up to MAX_MATCH_LEN. suffix_BM: those, the last first."""
    place_X = torch.arange(tokens_BX.shape[1], device=tokens_BX.device)
    is_match_BX = is_place_BX
    match_len_BX = torch.zeros_like(tokens_BX)
    for distance in range(MAX_MATCH_LEN):
        is_equal_BX = tokens_BX.roll(distance, dims=1) == suffix_BM[:, distance : distance + 1]
        is_match_BX = is_match_BX & (place_X >= distance) & is_equal_BX
        match_len_BX += is_match_BX
    return match_len_BX


def _best(match_len_BX: Tensor, place_X: Tensor) -> tuple[Tensor, Tensor]:
    """(key of the longest match, the latest among equals, 0 if there is none; its place), [B, 1] each."""
    key_BX = torch.where(match_len_BX > 0, (match_len_BX << 32) + place_X, 0)
    key_B1, place_B1 = key_BX.max(dim=1, keepdim=True)
    return key_B1, place_B1
