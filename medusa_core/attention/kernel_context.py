"""What attention layers see of a step that runs on kernels: device tensors alone describe its rows, so the step can be captured.

`KernelContext` holds where the step's keys and values go and which attention to call; trees and prompt chunks differ in that call.

Shapes: T packed rows · B lanes of the step · N nodes · P lanes of the runner · Q query tiles · X block-table width · H/G query/KV
heads · D head dim · S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medusa_core.attention.context import LayerCache, LayerShape
from medusa_core.attention.segments import AttentionParams
from medusa_core.kernels.attention import SplitWorkspace, chunk_attention, tree_attention, tree_splits
from medusa_core.kernels.kv_cache import write_kv

# (query_THD, key_slots_SGD, value_slots_SGD, scaling=, window=, softcap=, sinks_H=) -> [T, H, Dv]
_Attention = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTables:
    """Where lanes keep their tokens. table_PX: int64, -1 = no block; reads beyond a lane's blocks fall on the spare slot."""

    table_PX: Tensor
    block_size: int
    spare_slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelContext:
    """An AttentionContext. slots_T: int64, where each row's key and value go."""

    cache: LayerCache
    slots_T: Tensor
    attention: _Attention

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(key_slots_SGD, value_slots_SGD)."""
        return self.cache.layer(layer_idx)

    def attend(self, layer_idx: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, params: AttentionParams) -> Tensor:
        """See AttentionContext."""
        write_kv(key_TGD, value_TGD, *self.cache.layer(layer_idx), self.slots_T)
        return self.attend_written(layer_idx, query_THD, params)

    def attend_written(self, layer_idx: int, query_THD: Tensor, params: AttentionParams) -> Tensor:
        """As `attend`, for a layer that has written its keys and values itself."""
        return self.attention(
            query_THD,
            *self.cache.layer(layer_idx),
            scaling=params.scaling,
            window=params.window,
            softcap=params.softcap,
            sinks_H=params.sinks_H,
        )


def tree_context(
    cache: LayerCache,
    slots_T: Tensor,
    tables: BlockTables,
    *,
    lane_B: Tensor,
    base_B: Tensor,
    depth_N: Tensor,
    ancestor_bits_N: Tensor,
    workspace: SplitWorkspace,
    use_pdl: bool,
) -> KernelContext:
    """B lanes with a tree of N nodes each; T = B * N. For the arguments see kernels.attention.tree_attention."""
    attention = partial(
        _attend_trees,
        block_table_PX=tables.table_PX,
        block_size=tables.block_size,
        spare_slot=tables.spare_slot,
        lane_B=lane_B,
        base_B=base_B,
        depth_N=depth_N,
        ancestor_bits_N=ancestor_bits_N,
        workspace=workspace,
        use_pdl=use_pdl,
    )
    return KernelContext(cache=cache, slots_T=slots_T, attention=attention)


def tree_workspace(
    steps: Iterable[tuple[int, int]], num_heads: int, layer_shapes: Iterable[LayerShape], device: torch.device
) -> SplitWorkspace:
    """Scratch for the trees of every step in `steps` (lanes, nodes), which never run at once. num_heads: H, of all layers."""
    shapes = list(layer_shapes)
    sizes = [
        lanes * nodes * num_heads * tree_splits(lanes, nodes, num_heads, num_kv_heads)
        for lanes, nodes in steps
        for num_kv_heads in {shape[0] for shape in shapes}
    ]
    return SplitWorkspace(max(sizes), max(value_dim for _, _, value_dim in shapes), device)


def _attend_trees(
    query_THD: Tensor, key_slots_SGD: Tensor, value_slots_SGD: Tensor, *, lane_B: Tensor, depth_N: Tensor, **arguments: Any
) -> Tensor:
    num_heads, num_kv_heads = query_THD.shape[1], key_slots_SGD.shape[1]
    num_splits = tree_splits(lane_B.shape[0], depth_N.shape[0], num_heads, num_kv_heads)
    return tree_attention(
        query_THD, key_slots_SGD, value_slots_SGD, lane_B=lane_B, depth_N=depth_N, num_splits=num_splits, **arguments
    )


def chunk_context(cache: LayerCache, slots_T: Tensor, tables: BlockTables, *, tiles_4Q: Tensor, tile_rows: int) -> KernelContext:
    """Rows of prompt chunks. tiles_4Q: int32, lane, first row, number of rows and position of the first row of each query tile."""
    lane_Q, row_Q, num_rows_Q, position_Q = tiles_4Q
    attention = partial(
        chunk_attention,
        block_table_PX=tables.table_PX,
        block_size=tables.block_size,
        spare_slot=tables.spare_slot,
        tile_lane_Q=lane_Q,
        tile_row_Q=row_Q,
        tile_num_rows_Q=num_rows_Q,
        tile_position_Q=position_Q,
        tile_rows=tile_rows,
    )
    return KernelContext(cache=cache, slots_T=slots_T, attention=attention)
