"""What sequential heads read at the nodes of one level of a tree: the parent's state and the embedding of the node's own token.

The reference is the torch branch of `SequentialHeads.step`.

Shapes: B lanes · m, n nodes with children on the level above and on this one · R = n * B rows · C candidates · J keys · E hidden ·
U base vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options
from medusa_core.kernels.topk import EMPTY, unpack_column


@triton.jit
def _unit_rms(x_E, E: tl.constexpr, eps):
    wide_E = x_E.to(tl.float32)
    return wide_E * tl.rsqrt(tl.sum(wide_E * wide_E, axis=0) / E + eps)


@triton.jit
def _token_of_rank(keys, token_map, rank, num_keys, BLOCK_J: tl.constexpr):
    """The token of the key that has `rank` larger ones."""
    j_J = tl.arange(0, BLOCK_J)
    key_J = tl.load(keys + j_J, mask=j_J < num_keys, other=EMPTY)
    for _ in range(rank):
        key_J = tl.where(key_J == tl.max(key_J), EMPTY, key_J)
    column = unpack_column(tl.max(key_J))
    if token_map is not None:
        column = tl.load(token_map + column)
    return column


@triton.jit
def _join_kernel(
    state,
    candidates,
    token_map,
    parent_ptr,
    rank_ptr,
    embedding,
    out_state,
    out_input,
    out_token,
    num_lanes,
    num_candidates,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One row. Grid (R,)."""
    follow_on(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    node = row // num_lanes
    above = tl.load(parent_ptr + node) * num_lanes + row % num_lanes
    e_E = tl.arange(0, BLOCK_E)
    mask_E = e_E < E
    state_E = tl.load(state + above * E + e_E, mask=mask_E, other=0.0)
    rank = tl.load(rank_ptr + node)
    if HAS_KEYS:
        token = _token_of_rank(candidates + above * num_candidates, token_map, rank, num_candidates, BLOCK_J)
    else:
        token = tl.load(candidates + above * num_candidates + rank)
    embedding_E = tl.load(embedding + token * E + e_E, mask=mask_E, other=0.0)
    tl.store(out_state + row * E + e_E, state_E, mask=mask_E)
    dtype = out_input.dtype.element_ty
    tl.store(out_input + row * 2 * E + e_E, _unit_rms(state_E, E, eps).to(dtype), mask=mask_E)
    tl.store(out_input + (row * 2 + 1) * E + e_E, _unit_rms(embedding_E, E, eps).to(dtype), mask=mask_E)
    tl.store(out_token + row, token)


def join_inputs(
    state_mBE: Tensor,
    candidates_mBC: Tensor,
    parent_n: Tensor,
    rank_n: Tensor,
    embedding_UE: Tensor,
    *,
    eps: float,
    has_keys: bool = False,
    token_map_V: Tensor | None = None,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The parents' states [R, E], what the heads read [R, 2E] (state and embedding, each divided by its root mean square), and the
    nodes' tokens, int64 [R]. Rows go node by node, the lanes of each together.

    Args:
        state_mBE: contiguous, in the embedding's dtype.
        candidates_mBC: int64, contiguous: base ids, best first, or in any order all keys (`kernels.near_top`), if `has_keys`.
        parent_n, rank_n: int64; see `SequentialHeads.step`.
        token_map_V: base id of each column of the keys; None where they are the same.
    """
    num_lanes, hidden_size = state_mBE.shape[1:]
    num_rows = num_lanes * parent_n.shape[0]
    out_RE = state_mBE.new_empty(num_rows, hidden_size)
    input_RJ = state_mBE.new_empty(num_rows, 2 * hidden_size)
    token_R = candidates_mBC.new_empty(num_rows)
    _join_kernel[(num_rows,)](
        state_mBE.contiguous(),
        candidates_mBC.contiguous(),
        token_map_V,
        parent_n,
        rank_n,
        embedding_UE,
        out_RE,
        input_RJ,
        token_R,
        num_lanes,
        candidates_mBC.shape[2],
        eps,
        E=hidden_size,
        BLOCK_E=triton.next_power_of_2(hidden_size),
        HAS_KEYS=has_keys,
        BLOCK_J=triton.next_power_of_2(candidates_mBC.shape[2]),
        USE_PDL=use_pdl,
        num_warps=4 if hidden_size <= 2048 else 8,
        **launch_options(use_pdl),
    )
    return out_RE, input_RJ, token_R
