"""Noise as a pure function of (key, index of the token drawn, token id).

A draw is `argmax(logit / T + gumbel)`, and the Gumbel noise of a token comes from an integer hash instead of a generator with
state. So the draw at an index does not depend on how many draws came before, on the batch, or on the tree: speculation on, off
and any tree shape give the same tokens. Integer operations wrap the same way on every device, so the bits are the same too.

Hashes: splitmix64 (Steele, Lea, Flood 2014) turns (key, index) into two 32-bit words; each token id then passes twice through
`lowbias32` (Wellons, "Prospecting for Hash Functions", 2018), once per word.

Shapes: R rows · V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch has no unsigned arithmetic, so constants above the sign bit are written as their two's complement.
_GOLDEN_64 = 0x9E3779B97F4A7C15 - 2**64
_MIX_A_64 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_B_64 = 0x94D049BB133111EB - 2**64
_MIX_A_32 = 0x7FEB352D
_MIX_B_32 = 0x846CA68B - 2**32
# The largest float32 below 1: noise stays finite for every hash value.
_BELOW_ONE = 1.0 - 2.0**-24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` is arithmetic on signed integers."""
    width = 64 if x.dtype == torch.int64 else 32
    return (x >> bits) & ((1 << (width - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_A_64
    x = (x ^ _shift_right(x, 27)) * _MIX_B_64
    return x ^ _shift_right(x, 31)


def _lowbias32_(x: Tensor) -> Tensor:
    """In place on an int32 tensor: a vocabulary-sized temporary per operation would cost more than the operation."""
    x ^= _shift_right(x, 16)
    x *= _MIX_A_32
    x ^= _shift_right(x, 15)
    x *= _MIX_B_32
    x ^= _shift_right(x, 16)
    return x


def hash_bits(key_R: Tensor, index_R: Tensor, token_ids_V: Tensor) -> Tensor:
    """32 random bits for each (row, token id).

    Args:
        key_R: int64, the choice's noise key.
        index_R: int64, index of the token drawn (0 is the first token after the prompt).
        token_ids_V: int32.

    Returns:
        int32 [R, V]; read as unsigned, uniform on [0, 2**32).
    """
    state_R = _splitmix64(key_R + (index_R + 1) * _GOLDEN_64)
    low_R1 = state_R.to(torch.int32).unsqueeze(1)
    high_R1 = (state_R >> 32).to(torch.int32).unsqueeze(1)
    bits_RV = _lowbias32_(token_ids_V.unsqueeze(0) ^ low_R1)
    bits_RV ^= high_R1
    return _lowbias32_(bits_RV)


def gumbel(key_R: Tensor, index_R: Tensor, token_ids_V: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [R, V].

    Written as -log(E) with E = -log(1 - u) exponential: the winner of a large vocabulary has a tiny E, and u keeps its full
    precision near 0 (near 1 it would be a multiple of 2**-24, and a flat distribution over 150k tokens would have ties).
    """
    bits_RV = hash_bits(key_R, index_R, token_ids_V)
    # signed to unsigned: add 2**31 to the flipped sign bit, in float
    uniform_RV = bits_RV.to(torch.float32).mul_(2.0**-32)
    uniform_RV += (bits_RV < 0).to(torch.float32)
    uniform_RV += 2.0**-33
    uniform_RV.clamp_(min=2.0**-33, max=_BELOW_ONE)
    return uniform_RV.neg_().log1p_().neg_().log_().neg_()
