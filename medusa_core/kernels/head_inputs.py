"""What sequential heads read at the nodes of one level of a tree: the parent's state and the embedding of the node's own token.

The reference is the torch branch of `SequentialHeads.step`.

Shapes: B lanes · m, n nodes with children on the level above and on this one · R = B * n rows · C candidates · E hidden · U base
vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from medusa_core.kernels.support import follow_on, launch_options


@triton.jit
def _unit_rms(x_E, E: tl.constexpr, eps):
    wide_E = x_E.to(tl.float32)
    return wide_E * tl.rsqrt(tl.sum(wide_E * wide_E, axis=0) / E + eps)


@triton.jit
def _join_kernel(
    state,
    lists,
    parent_ptr,
    rank_ptr,
    embedding,
    out_state,
    out_input,
    out_token,
    num_parents,
    num_nodes,
    num_candidates,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One row. Grid (R,)."""
    follow_on(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    node = row % num_nodes
    above = row // num_nodes * num_parents + tl.load(parent_ptr + node)
    token = tl.load(lists + above * num_candidates + tl.load(rank_ptr + node))
    e_E = tl.arange(0, BLOCK_E)
    mask_E = e_E < E
    state_E = tl.load(state + above * E + e_E, mask=mask_E, other=0.0)
    embedding_E = tl.load(embedding + token * E + e_E, mask=mask_E, other=0.0)
    tl.store(out_state + row * E + e_E, state_E, mask=mask_E)
    dtype = out_input.dtype.element_ty
    tl.store(out_input + row * 2 * E + e_E, _unit_rms(state_E, E, eps).to(dtype), mask=mask_E)
    tl.store(out_input + (row * 2 + 1) * E + e_E, _unit_rms(embedding_E, E, eps).to(dtype), mask=mask_E)
    tl.store(out_token + row, token)


def join_inputs(
    state_BmE: Tensor,
    lists_BmC: Tensor,
    parent_n: Tensor,
    rank_n: Tensor,
    embedding_UE: Tensor,
    *,
    eps: float,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The parents' states [R, E], what the heads read [R, 2E] (state and embedding, each divided by its root mean square), and the
    nodes' tokens, int64 [R].

    Args:
        state_BmE: contiguous, in the embedding's dtype. lists_BmC: base ids, int64, contiguous.
        parent_n, rank_n: int64; see `SequentialHeads.step`.
    """
    num_lanes, num_parents, hidden_size = state_BmE.shape
    num_nodes = parent_n.shape[0]
    num_rows = num_lanes * num_nodes
    out_RE = state_BmE.new_empty(num_rows, hidden_size)
    input_RJ = state_BmE.new_empty(num_rows, 2 * hidden_size)
    token_R = lists_BmC.new_empty(num_rows)
    _join_kernel[(num_rows,)](
        state_BmE.contiguous(),
        lists_BmC.contiguous(),
        parent_n,
        rank_n,
        embedding_UE,
        out_RE,
        input_RJ,
        token_R,
        num_parents,
        num_nodes,
        lists_BmC.shape[2],
        eps,
        E=hidden_size,
        BLOCK_E=triton.next_power_of_2(hidden_size),
        USE_PDL=use_pdl,
        num_warps=4 if hidden_size <= 2048 else 8,
        **launch_options(use_pdl),
    )
    return out_RE, input_RJ, token_R
