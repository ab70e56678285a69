"""Largest entries of long rows: argmax and top-k.

Both pack (value, column) into one int64 that orders like the value and, among equals, puts the lowest column first. A selection
is then a plain integer maximum, exact and the same for every split of a row over programs.

Shapes: R rows · V vocabulary · C candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options

# Below the image of every float32.
EMPTY = tl.constexpr(-(2**63))
# Columns per program of the top-k; wider when there are programs enough, or too many candidates for one merge.
_MIN_PART_LEN = 1024
_MAX_PART_LEN = 4096
_NUM_PROGRAMS_TO_FILL = 2048
_MAX_MERGE_LEN = 8192
# Columns that a program of the argmax reads at once, and how many programs share the rows.
_ARGMAX_BLOCK_LEN = 4096
_ARGMAX_NUM_PROGRAMS = 128


@triton.jit
def ordered_bits(value) -> tl.tensor:
    """float32 to int32 of the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_bits(ordered) -> tl.tensor:
    """The inverse of `ordered_bits`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(value, column) -> tl.tensor:
    """(float32, int32 >= 0) to int64: larger value first, then lower column. NaN counts as -inf, -0.0 as 0.0."""
    value = tl.where(value == value, value, float("-inf"))
    value = tl.where(value == 0.0, 0.0, value)
    return (ordered_bits(value).to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def unpack_column(key) -> tl.tensor:
    """Column of a packed key, int64."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _argmax_part(
    logits_ptr, out_ptr, num_columns, row_stride, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr
):
    """Best of NUM_BLOCKS * BLOCK columns: its key, or its column when the part is the whole row. Grid (R, parts)."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * (NUM_BLOCKS * BLOCK)
    columns = begin + tl.arange(0, BLOCK)
    best_value = tl.full([BLOCK], float("-inf"), tl.float32)
    best_column = columns
    for block in range(NUM_BLOCKS):
        columns = begin + block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits_ptr + row * row_stride + columns, mask=columns < num_columns, other=float("-inf"))
        # strictly: the first of equals stays, and NaN never wins
        is_better = value > best_value
        best_value = tl.where(is_better, value, best_value)
        best_column = tl.where(is_better, columns, best_column)
    key = tl.max(pack(best_value, best_column))
    out = out_ptr + row * tl.num_programs(1) + tl.program_id(1)
    if IS_WHOLE:
        tl.store(out, unpack_column(key))
    else:
        tl.store(out, key)


@triton.jit
def _part_candidates(
    logits_ptr, keys_ptr, num_columns, row_stride, NUM_CANDIDATES: tl.constexpr, PART: tl.constexpr, USE_PDL: tl.constexpr
):
    """Keys of the best columns of one part of a row, best first. Grid (R, parts)."""
    follow_on(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * PART + tl.arange(0, PART)
    is_inside = columns < num_columns
    values = tl.load(logits_ptr + row * row_stride + columns, mask=is_inside, other=float("-inf"))
    keys = tl.where(is_inside, pack(values, columns), EMPTY)
    out = keys_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * NUM_CANDIDATES
    for candidate in range(NUM_CANDIDATES):
        best = tl.max(keys)
        tl.store(out + candidate, best)
        keys = tl.where(keys == best, EMPTY, keys)


@triton.jit
def _merge_candidates(
    keys_ptr,
    ids_ptr,
    values_ptr,
    token_map_ptr,
    num_keys,
    NUM_CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The best of a row's keys, best first, as ids and (optionally) values. Grid (R,)."""
    follow_on(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + row * num_keys + offsets, mask=offsets < num_keys, other=EMPTY)
    for candidate in range(NUM_CANDIDATES):
        best = tl.max(keys)
        token_id = unpack_column(best)
        if token_map_ptr is not None:
            token_id = tl.load(token_map_ptr + token_id)
        tl.store(ids_ptr + row * NUM_CANDIDATES + candidate, token_id)
        if values_ptr is not None:
            tl.store(values_ptr + row * NUM_CANDIDATES + candidate, from_ordered_bits((best >> 32).to(tl.int32)))
        keys = tl.where(keys == best, EMPTY, keys)


def argmax_rows(logits_RV: Tensor) -> Tensor:
    """Column of the largest entry of each row, int64 [R]; the lowest among equals, as torch on the CPU.

    Args:
        logits_RV: float32, contiguous along V. NaN counts as -inf, so the result is always a column.
    """
    num_rows, num_columns = _check(logits_RV)
    num_parts = max(_ARGMAX_NUM_PROGRAMS // max(num_rows, 1), 1)
    # small parts read less at once, so that a part is not mostly padding
    block_len = _ARGMAX_BLOCK_LEN if num_parts == 1 else _ARGMAX_BLOCK_LEN // 2
    num_blocks = triton.cdiv(triton.cdiv(num_columns, num_parts), block_len)
    num_parts = triton.cdiv(num_columns, num_blocks * block_len)
    out_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    keys_RJ = out_R if num_parts == 1 else torch.empty(num_rows, num_parts, dtype=torch.int64, device=logits_RV.device)
    if num_rows == 0:
        return out_R
    _argmax_part[(num_rows, num_parts)](
        logits_RV, keys_RJ, num_columns, logits_RV.stride(0), num_blocks, block_len, num_parts == 1, num_warps=8
    )
    if num_parts > 1:
        _merge(keys_RJ, out_R, None, None, 1, False)
    return out_R


def best_of_keys(keys_RJ: Tensor, *, use_pdl: bool = False) -> Tensor:
    """Column of the largest of each row's keys (`pack`), int64 [R]. keys_RJ: int64, contiguous.

    use_pdl: launch while the kernel before still runs (programmatic dependent launch, sm_90 and later); here and below.
    """
    out_R = torch.empty(keys_RJ.shape[0], dtype=torch.int64, device=keys_RJ.device)
    if keys_RJ.shape[0] > 0:
        _merge(keys_RJ, out_R, None, None, 1, use_pdl)
    return out_R


def candidates_of_keys(keys_RJ: Tensor, num_candidates: int, *, token_map_V: Tensor | None = None, use_pdl: bool = False) -> Tensor:
    """Columns of the C largest of each row's keys (`pack`), best first, or what the map holds for them: int64 [R, C].

    keys_RJ: int64, contiguous, at least C of them.
    """
    ids_RC = torch.empty(keys_RJ.shape[0], num_candidates, dtype=torch.int64, device=keys_RJ.device)
    if keys_RJ.shape[0] > 0:
        _merge(keys_RJ, ids_RC, None, token_map_V, num_candidates, use_pdl)
    return ids_RC


def topk_rows(logits_RV: Tensor, num_candidates: int, *, token_map_V: Tensor | None = None, use_pdl: bool = False) -> Tensor:
    """Columns of the C largest entries of each row, int64 [R, C]: best first, the lowest column first among equals.

    Args:
        logits_RV: float32, contiguous along V. NaN counts as -inf.
        num_candidates: C, from 1 to V.
        token_map_V: int64; where given, the result holds its entries instead of the columns (draft id to base id).

    Raises:
        ValueError: C is not between 1 and V, or C is beyond what one merge holds (about 8,192 / (V / 4,096)).
    """
    return topk_rows_with_values(logits_RV, num_candidates, token_map_V=token_map_V, has_values=False, use_pdl=use_pdl)[0]


def topk_rows_with_values(
    logits_RV: Tensor, num_candidates: int, *, token_map_V: Tensor | None = None, has_values: bool = True, use_pdl: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`topk_rows` and the entries themselves, float32 [R, C] (None if not `has_values`)."""
    num_rows, num_columns = _check(logits_RV)
    if not 1 <= num_candidates <= num_columns:
        raise ValueError(f"num_candidates = {num_candidates} is not between 1 and the {num_columns} columns")
    part_len = _part_len(num_rows, num_columns, num_candidates)
    num_parts = triton.cdiv(num_columns, part_len)
    ids_RC = torch.empty(num_rows, num_candidates, dtype=torch.int64, device=logits_RV.device)
    values_RC = torch.empty(ids_RC.shape, dtype=torch.float32, device=logits_RV.device) if has_values else None
    if num_rows == 0:
        return ids_RC, values_RC
    keys_RJ = torch.empty(num_rows, num_parts * num_candidates, dtype=torch.int64, device=logits_RV.device)
    _part_candidates[(num_rows, num_parts)](
        logits_RV,
        keys_RJ,
        num_columns,
        logits_RV.stride(0),
        num_candidates,
        part_len,
        use_pdl,
        num_warps=4,
        **launch_options(use_pdl),
    )
    _merge(keys_RJ, ids_RC, values_RC, token_map_V, num_candidates, use_pdl)
    return ids_RC, values_RC


def _part_len(num_rows: int, num_columns: int, num_candidates: int) -> int:
    part_len = _MIN_PART_LEN
    while part_len < _MAX_PART_LEN:
        num_parts = triton.cdiv(num_columns, part_len)
        if num_parts * num_candidates <= _MAX_MERGE_LEN and num_parts * num_rows <= _NUM_PROGRAMS_TO_FILL:
            break
        part_len *= 2
    if triton.cdiv(num_columns, part_len) * num_candidates > 2 * _MAX_MERGE_LEN:
        raise ValueError(f"top {num_candidates} of {num_columns} columns is more than the kernel merges")
    return part_len


def _merge(
    keys_RJ: Tensor, ids_RC: Tensor, values_RC: Tensor | None, token_map_V: Tensor | None, num_candidates: int, use_pdl: bool
) -> None:
    num_rows, num_keys = keys_RJ.shape
    block_len = triton.next_power_of_2(num_keys)
    num_warps = 1 if block_len <= 128 else 4 if block_len <= 2048 else 16
    _merge_candidates[(num_rows,)](
        keys_RJ,
        ids_RC,
        values_RC,
        token_map_V,
        num_keys,
        num_candidates,
        block_len,
        use_pdl,
        num_warps=num_warps,
        **launch_options(use_pdl),
    )


def _check(logits_RV: Tensor) -> tuple[int, int]:
    assert logits_RV.dtype == torch.float32, logits_RV.dtype
    assert logits_RV.stride(1) == 1 or logits_RV.shape[1] == 1, "rows are contiguous"
    return logits_RV.shape[0], logits_RV.shape[1]
