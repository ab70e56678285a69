"""Which tokens may be drawn, as bits: token t is bit t % 32 of word t // 32.

Shapes: R rows · V vocabulary · W words of 32 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_tokens(logits_RV: Tensor, bits_RW: Tensor) -> Tensor:
    """A copy of the logits, float32, in which tokens whose bit is 0 are -inf. bits_RW: int32, W at least V / 32."""
    shift_32 = torch.arange(32, dtype=torch.int32, device=bits_RW.device)
    is_allowed_RV = ((bits_RW.unsqueeze(2) >> shift_32) & 1).flatten(1)[:, : logits_RV.shape[1]]
    return torch.where(is_allowed_RV > 0, logits_RV, -torch.inf)
