"""Noise keys: all randomness of a choice is a function of its key, the index of the token drawn and the token id."""

from __future__ import annotations

import secrets

_MASK = 2**64 - 1
# Increment and multipliers of SplitMix64 (Steele, Lea and Flood, 2014).
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def noise_key(seed: int | None, choice_idx: int) -> int:
    """An unsigned 64-bit key, a pure function of (seed, choice index); fresh random bits without a seed.

    The number of choices does not enter, so choice 0 of n draws what n = 1 draws.
    """
    if seed is None:
        return secrets.randbits(64)
    return _mix(_mix(seed & _MASK) + choice_idx)


def _mix(value: int) -> int:
    """One output of SplitMix64 for this state: neighbouring values give unrelated results."""
    value = (value + _GOLDEN_GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)
