"""Sampling without a sort: top-k, top-p and min-p tested on the token that won, not applied to all tokens before the draw.

A filter keeps the tokens at or above some scaled logit s. So: draw from all tokens (the best s + noise); if the winner x is
outside the kept set, everything with s <= s_x is outside too; draw again from the tokens with s > s_x, with the same noise. The
first winner inside the kept set is the winner of the kept set. The winner is inside with at least the probability of the set,
so one round is the usual case. (Rejection instead of sorting: FlashInfer's sampling kernels.)

Whether x is kept needs only sums over the tokens above it: their count < top_k, their mass < top_p * mass (of the top-k set, if
both are on), and s_x >= max + log(min_p). Rows are cut into parts whose maxima are known, and parts with nothing above x are not
read again. Parts are the same for every number of rows and are summed in the same order, so a draw does not depend on its batch.

Shapes: R rows · V vocabulary · P lanes of the runner · W stop ids per lane (-1 = none) · J parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.noise import gumbel, hash_state
from medusa_core.kernels.topk import EMPTY, from_ordered_bits, ordered_bits, pack, unpack_column

# As in `medusa_core.sampling.sampler`: noise decides exact ties only.
_MIN_TEMPERATURE = tl.constexpr(1e-6)
# Up to this top-k its edge is found by stepping down from the maximum, beyond by bisection.
_MAX_TOP_K_STEPS = tl.constexpr(256)


@triton.constexpr_function
def _padded(length):
    return triton.next_power_of_2(length)


@triton.jit
def _scaled_part(source, part, STOPS: tl.constexpr, PART: tl.constexpr):
    """(scaled logits, columns) of one part: stop ids banned, NaN as -inf, out of the row -inf.

    Args:
        source: what a row's logits are and become: (pointer to them, their number, temperature, pointer to STOPS stop
            ids, whether they are banned).
    """
    row_ptr, num_columns, temperature, stop_ids_ptr, is_banning = source
    columns = part * PART + tl.arange(0, PART)
    logits = tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf"))
    logits = tl.where(logits == logits, logits, float("-inf"))
    if is_banning:
        for stop in range(STOPS):
            # the padding, -1, is no column
            logits = tl.where(columns == tl.load(stop_ids_ptr + stop), float("-inf"), logits)
    # rounded as torch rounds it; the plain operator is approximate
    return tl.math.div_rn(logits, temperature), columns


@triton.jit
def _lane_temperature(temperature_ptr, lane):
    """(divisor, is greedy). Greedy rows are divided by 1."""
    temperature = tl.load(temperature_ptr + lane)
    is_greedy = temperature == 0.0
    return tl.where(is_greedy, 1.0, tl.maximum(temperature, _MIN_TEMPERATURE)), is_greedy


@triton.jit
def _draw_part(
    logits_ptr, lane_ptr, index_ptr, temperature_ptr, min_tokens_ptr, stop_ids_ptr, key_ptr,
    best_ptr, max_ptr, mass_ptr, num_columns, row_stride, STOPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Of one part: the best (s + noise, column) as a key, the largest s, and the sum of exp(s - largest). Grid (R, J)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, index = tl.load(lane_ptr + row), tl.load(index_ptr + row)
    temperature, is_greedy = _lane_temperature(temperature_ptr, lane)
    stop_ids_ptr += lane * STOPS
    is_banning = index < tl.load(min_tokens_ptr + lane)
    source = (logits_ptr + row * row_stride, num_columns, temperature, stop_ids_ptr, is_banning)
    scaled, columns = _scaled_part(source, part, STOPS, PART)
    out = row * tl.num_programs(1) + part
    score = scaled
    if is_greedy == 0:
        low, high = hash_state(tl.load(key_ptr + lane), index)
        score = scaled + gumbel(low, high, columns)
        largest = tl.max(scaled)
        # a part without a finite entry has no mass; subtracting its maximum would give NaN
        weights = tl.where(scaled == float("-inf"), 0.0, tl.exp(scaled - largest))
        tl.store(max_ptr + out, largest)
        tl.store(mass_ptr + out, tl.sum(weights))
    tl.store(best_ptr + out, tl.max(tl.where(columns < num_columns, pack(score, columns), EMPTY)))


@triton.jit
def _above(edge, row_max, part_max_ptr, source, NUM_PARTS: tl.constexpr, STOPS: tl.constexpr, PART: tl.constexpr):
    """(number, sum of exp(s - row maximum)) of the tokens with s > edge."""
    count = tl.zeros([PART], tl.int32)
    mass = tl.zeros([PART], tl.float32)
    for part in range(NUM_PARTS):
        if tl.load(part_max_ptr + part) > edge:
            scaled, _ = _scaled_part(source, part, STOPS, PART)
            is_above = scaled > edge
            count += is_above.to(tl.int32)
            mass += tl.where(is_above, tl.exp(scaled - row_max), 0.0)
    return tl.sum(count), tl.sum(mass)


@triton.jit
def _best_above(edge, threshold, low, high, part_max_ptr, source, NUM_PARTS: tl.constexpr, STOPS: tl.constexpr, PART: tl.constexpr):
    """Key of the best (s + noise, column) of the tokens with s > edge and s >= threshold."""
    best = tl.full([PART], EMPTY, tl.int64)
    for part in range(NUM_PARTS):
        part_max = tl.load(part_max_ptr + part)
        if (part_max > edge) & (part_max >= threshold):
            scaled, columns = _scaled_part(source, part, STOPS, PART)
            is_left = (scaled > edge) & (scaled >= threshold)
            key = pack(scaled + gumbel(low, high, columns), columns)
            best = tl.maximum(best, tl.where(is_left, key, EMPTY))
    return tl.max(best)


@triton.jit
def _step_to_top_k(top_k, row_max, part_max_ptr, source, NUM_PARTS: tl.constexpr, STOPS: tl.constexpr, PART: tl.constexpr):
    """(k-th largest s, mass of the tokens at or above it): takes the largest value left, and rereads only the part it was in."""
    parts = tl.arange(0, _padded(NUM_PARTS))
    part_max = tl.load(part_max_ptr + parts, mask=parts < NUM_PARTS, other=float("-inf"))
    value = row_max
    edge = tl.full([], float("inf"), tl.float32)
    count = tl.sum(tl.zeros([PART], tl.int32))
    mass = row_max * 0.0
    # ties with the k-th belong to the set, in this part or another
    while (value > float("-inf")) & ((count < top_k) | (value == edge)):
        part = tl.min(tl.where(part_max == value, parts, NUM_PARTS))
        scaled, _ = _scaled_part(source, part, STOPS, PART)
        num_equal = tl.sum((scaled == value).to(tl.int32))
        count += num_equal
        mass += num_equal.to(tl.float32) * tl.exp(value - row_max)
        # values only fall; a plain `edge = value` is lost in what triton 3.6 makes of the loop
        edge = tl.minimum(edge, value)
        part_max = tl.where(parts == part, tl.max(tl.where(scaled < value, scaled, float("-inf"))), part_max)
        value = tl.max(part_max)
    return edge, mass


@triton.jit
def _bisect_to_top_k(top_k, row_max, part_max_ptr, source, NUM_PARTS: tl.constexpr, STOPS: tl.constexpr, PART: tl.constexpr):
    """(edge, mass of the tokens with s >= edge), the same tokens as those at or above the k-th largest s; at most 32 rounds."""
    # in the integers that order like floats: edge is the largest with k tokens at or above it, and `last` is never below it
    lowest = ordered_bits(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
    edge = lowest
    last = ordered_bits(row_max).to(tl.int64)
    while edge < last:
        middle = edge + (last - edge + 1) // 2
        below = from_ordered_bits((middle - 1).to(tl.int32))
        count, _ = _above(below, row_max, part_max_ptr, source, NUM_PARTS, STOPS, PART)
        # with exactly k tokens the set is found
        last = tl.where(count < top_k, middle - 1, tl.where(count == top_k, middle, last))
        edge = tl.where(count < top_k, edge, middle)
    value = from_ordered_bits(edge.to(tl.int32))
    # -inf has no predecessor, and no mass
    below = from_ordered_bits(tl.maximum(edge - 1, lowest).to(tl.int32))
    _, mass = _above(below, row_max, part_max_ptr, source, NUM_PARTS, STOPS, PART)
    return value, mass


@triton.jit
def _choose(
    logits_ptr, lane_ptr, index_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, min_tokens_ptr, stop_ids_ptr, key_ptr,
    best_ptr, max_ptr, mass_ptr, token_ptr, num_columns, row_stride,
    NUM_PARTS: tl.constexpr, STOPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The token of a row, from what `_draw_part` left; draws again while the winner is filtered out. Grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.load(lane_ptr + row)
    temperature, is_greedy = _lane_temperature(temperature_ptr, lane)
    top_k, top_p, min_p = tl.load(top_k_ptr + lane), tl.load(top_p_ptr + lane), tl.load(min_p_ptr + lane)
    # beyond the vocabulary top-k is off
    top_k = tl.where(top_k < num_columns, top_k, 0)
    parts = tl.arange(0, _padded(NUM_PARTS))
    is_part = parts < NUM_PARTS
    part_max_ptr = max_ptr + row * NUM_PARTS
    token = unpack_column(tl.max(tl.load(best_ptr + row * NUM_PARTS + parts, mask=is_part, other=EMPTY)))
    has_filter = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if has_filter & (is_greedy == 0):
        row_ptr = logits_ptr + row * row_stride
        part_max = tl.load(part_max_ptr + parts, mask=is_part, other=float("-inf"))
        row_max = tl.max(part_max)
        scaled = tl.math.div_rn(tl.load(row_ptr + token), temperature)
        # The most likely token is always kept, also where rounding would say otherwise; a row of only -inf ends here too
        if scaled < row_max:
            index = tl.load(index_ptr + row)
            is_banning = index < tl.load(min_tokens_ptr + lane)
            source = (row_ptr, num_columns, temperature, stop_ids_ptr + lane * STOPS, is_banning)
            low, high = hash_state(tl.load(key_ptr + lane), index)
            part_mass = tl.load(mass_ptr + row * NUM_PARTS + parts, mask=is_part, other=0.0)
            mass_kept = tl.sum(tl.where(part_mass > 0.0, part_mass * tl.exp(part_max - row_max), 0.0))
            # log(0) = -inf switches min-p off
            threshold = row_max + tl.log(min_p)
            if (top_k > 0) & (top_p < 1.0):
                if top_k <= _MAX_TOP_K_STEPS:
                    edge, mass_kept = _step_to_top_k(top_k, row_max, part_max_ptr, source, NUM_PARTS, STOPS, PART)
                else:
                    edge, mass_kept = _bisect_to_top_k(top_k, row_max, part_max_ptr, source, NUM_PARTS, STOPS, PART)
                threshold = tl.maximum(threshold, edge)
            threshold = tl.minimum(threshold, row_max)
            max_above = tl.where(top_k > 0, top_k, num_columns)
            max_mass = tl.where(top_p < 1.0, top_p * mass_kept, float("inf"))
            is_kept = scaled >= row_max
            while is_kept == 0:
                count, mass = _above(scaled, row_max, part_max_ptr, source, NUM_PARTS, STOPS, PART)
                is_kept = (scaled >= threshold) & (count < max_above) & (mass < max_mass)
                if is_kept == 0:
                    best = _best_above(scaled, threshold, low, high, part_max_ptr, source, NUM_PARTS, STOPS, PART)
                    token = unpack_column(best)
                    scaled = tl.math.div_rn(tl.load(row_ptr + token), temperature)
                    is_kept = scaled >= row_max
    tl.store(token_ptr + row, token)


def draw_rows(
    logits_RV: Tensor,
    *,
    lane_R: Tensor,
    index_R: Tensor,
    temperature_P: Tensor,
    top_k_P: Tensor,
    top_p_P: Tensor,
    min_p_P: Tensor,
    min_tokens_P: Tensor,
    stop_ids_PW: Tensor,
    key_P: Tensor,
    part_len: int = 2048,
) -> Tensor:
    """One token id per row, int64 [R]: what `medusa_core.sampling.sampler.draw` returns with all filters on.

    Equal up to rounding where a sum of probabilities meets top-p, or two scores meet. Ties go to the lowest id, NaN counts as
    -inf, and the result is always an id of the vocabulary.

    Args:
        logits_RV: float32, contiguous along V; not modified. All other tensors are contiguous.
        lane_R: int64, whose parameters a row takes; all in [0, P).
        index_R: int64, index of the token drawn in its output (0 = first after the prompt).
        temperature_P (0 = greedy), top_p_P (1 = off), min_p_P (0 = off): float32.
        top_k_P (0 = off), min_tokens_P, key_P, stop_ids_PW (-1 = none): int64.
        part_len: columns per program, a power of two. It decides the rounding of sums: draws that must be equal share it.
    """
    num_rows, num_columns = logits_RV.shape
    assert logits_RV.dtype == temperature_P.dtype == top_p_P.dtype == min_p_P.dtype == torch.float32
    assert {t.dtype for t in (lane_R, index_R, top_k_P, min_tokens_P, stop_ids_PW, key_P)} == {torch.int64}
    assert logits_RV.stride(1) == 1 or num_columns == 1, "rows are contiguous"
    assert stop_ids_PW.is_contiguous()
    num_parts = triton.cdiv(num_columns, part_len)
    token_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    if num_rows == 0:
        return token_R
    best_RJ = torch.empty(num_rows, num_parts, dtype=torch.int64, device=logits_RV.device)
    max_RJ, mass_RJ = torch.empty(2, num_rows, num_parts, dtype=torch.float32, device=logits_RV.device)
    num_stop_ids = stop_ids_PW.shape[1]
    _draw_part[(num_rows, num_parts)](
        logits_RV, lane_R, index_R, temperature_P, min_tokens_P, stop_ids_PW, key_P,
        best_RJ, max_RJ, mass_RJ, num_columns, logits_RV.stride(0), num_stop_ids, part_len, num_warps=8,
    )  # fmt: skip
    _choose[(num_rows,)](
        logits_RV, lane_R, index_R, temperature_P, top_k_P, top_p_P, min_p_P, min_tokens_P, stop_ids_PW, key_P,
        best_RJ, max_RJ, mass_RJ, token_R, num_columns, logits_RV.stride(0),
        num_parts, num_stop_ids, part_len, num_warps=8,
    )  # fmt: skip
    return token_R
