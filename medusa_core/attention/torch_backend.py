"""The torch attention backend: gathers each lane's context through its block table and attends densely.

`attend` picks `scaled_dot_product_attention` where it can express the layer and plain matrix products where it cannot (soft-cap,
sinks). `attend_reference` is the plain product: the slow truth that faster kernels are tested against.

Shapes: B lanes · N queries per lane · C context slots · H/G query/KV heads · D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from medusa_core.attention.segments import AttentionParams, Segment


class TorchAttention:
    """Runs on any device torch supports. Stateless."""

    def attend(
        self, query_BNHD: Tensor, key_slots_SGD: Tensor, value_slots_SGD: Tensor, segment: Segment, params: AttentionParams
    ) -> Tensor:
        """See AttentionBackend."""
        if params.softcap is not None or params.sinks_H is not None:
            return attend_reference(query_BNHD, key_slots_SGD, value_slots_SGD, segment, params)
        query, key, value, mask = _fold(query_BNHD, key_slots_SGD, value_slots_SGD, segment, params)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=params.scaling)
        return _unfold(out, query_BNHD)


def attend_reference(
    query_BNHD: Tensor, key_slots_SGD: Tensor, value_slots_SGD: Tensor, segment: Segment, params: AttentionParams
) -> Tensor:
    """softmax(softcap(Q K^T * scaling) + mask, with sinks in the denominator) V, in float32."""
    query, key, value, mask = _fold(query_BNHD, key_slots_SGD, value_slots_SGD, segment, params)
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if params.sinks_H is not None:
        num_kv_heads, num_queries = key.shape[1], query_BNHD.shape[1]
        sinks = params.sinks_H.float().view(1, num_kv_heads, -1, 1).expand(scores.shape[0], -1, -1, num_queries)
        scores = torch.cat([scores, sinks.reshape(*scores.shape[:3], 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return _unfold(torch.matmul(weights, value.float()).to(query_BNHD.dtype), query_BNHD)


def _fold(
    query_BNHD: Tensor, key_slots_SGD: Tensor, value_slots_SGD: Tensor, segment: Segment, params: AttentionParams
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather the context and put query heads that share a KV head side by side as rows: [B, G, (H/G) * N, D].

    Grouped heads thus need neither repeated keys nor a special kernel.
    """
    num_lanes, num_queries, num_heads, head_dim = query_BNHD.shape
    num_kv_heads = key_slots_SGD.shape[1]
    num_repeats = num_heads // num_kv_heads
    key, value = (_gather(slots_SGD, segment).transpose(1, 2) for slots_SGD in (key_slots_SGD, value_slots_SGD))
    query = query_BNHD.transpose(1, 2).reshape(num_lanes, num_kv_heads, num_repeats * num_queries, head_dim)
    return query, key, value, segment.visible_mask(params.window, num_repeats)


def _gather(slots_SGD: Tensor, segment: Segment) -> Tensor:
    """[B, C, G, D]. Whole blocks at a time: fewer and longer copies."""
    blocks = slots_SGD.view(-1, segment.block_size, *slots_SGD.shape[1:])
    return blocks.index_select(0, segment.context_blocks).view(segment.num_lanes, -1, *slots_SGD.shape[1:])


def _unfold(out: Tensor, query_BNHD: Tensor) -> Tensor:
    """[B, G, (H/G) * N, Dv] -> [B, N, H, Dv]."""
    num_lanes, num_queries, num_heads, _ = query_BNHD.shape
    return out.reshape(num_lanes, num_heads, num_queries, out.shape[-1]).transpose(1, 2)
