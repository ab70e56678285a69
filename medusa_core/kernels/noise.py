"""The noise of `medusa_core.sampling.noise`, bit for bit, as functions that kernels call.

Hashes: splitmix64 (Steele, Lea, Flood 2014) turns (key, index) into two 32-bit words; each token id passes twice through
`lowbias32` (Wellons, "Prospecting for Hash Functions", 2018). Unsigned types, so shifts are logical and products wrap.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN_64 = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_A_64 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_B_64 = tl.constexpr(0x94D049BB133111EB)
_MIX_A_32 = tl.constexpr(0x7FEB352D)
_MIX_B_32 = tl.constexpr(0x846CA68B)


@triton.jit
def hash_state(key, index) -> tuple[tl.tensor, tl.tensor]:
    """(low, high) uint32 words of the stream of (key int64, index int64), scalars or blocks."""
    golden = tl.full([], _GOLDEN_64, tl.uint64)
    # wrapping is meant: overflow checks (TRITON_DEBUG) stay off
    step = tl.mul((index + 1).to(tl.uint64, bitcast=True), golden, sanitize_overflow=False)
    x = tl.add(key.to(tl.uint64, bitcast=True), step, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 30), tl.full([], _MIX_A_64, tl.uint64), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 27), tl.full([], _MIX_B_64, tl.uint64), sanitize_overflow=False)
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _lowbias32(x):
    x = tl.mul(x ^ (x >> 16), tl.full([], _MIX_A_32, tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), tl.full([], _MIX_B_32, tl.uint32), sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def hash_bits(low, high, token_ids) -> tl.tensor:
    """32 random bits (uint32) per token id (int32), for the words of `hash_state`."""
    return _lowbias32(_lowbias32(token_ids.to(tl.uint32, bitcast=True) ^ low) ^ high)


@triton.jit
def gumbel(low, high, token_ids) -> tl.tensor:
    """Standard Gumbel noise, float32: -log(E), E = -log(1 - u). u is the torch code's to the last bit, E to a few ulp."""
    bits = hash_bits(low, high, token_ids).to(tl.int32, bitcast=True)
    # the same roundings as in torch, which converts from signed
    u = bits.to(tl.float32) * 2.0**-32
    u = u + tl.where(bits < 0, 1.0, 0.0)
    u = tl.minimum(u + 2.0**-33, 1.0 - 2.0**-24)
    # log1p(-u) without a library call (Kahan): log(w) of the rounded w = 1 - u, corrected by u over what w really is away from 1
    w = 1.0 - u
    lost = 1.0 - w
    exponential = tl.where(lost == 0.0, u, -tl.log(w) * (u / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(exponential)
