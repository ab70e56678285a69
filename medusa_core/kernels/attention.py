"""Paged attention: trees of draft tokens for many lanes, and chunks of prompts, over the KV cache's slots.

Query heads that share a KV head are folded into rows, so that keys and values are read once per KV head. Trees can be split
over their context so that a single lane fills the chip; the last program of a tile to arrive merges the parts in the launch.
All lengths come from device memory: a captured launch serves every context length. The kernels: attention_programs.py.

Shapes: T packed query rows · B lanes of the step · P lanes of the runner · N tree nodes · Q chunk tiles · H/G query/KV heads · D/Dv
key and value head dim · S slots of the cache · X block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from medusa_core.kernels.attention_programs import chunk_kernel, tree_kernel
from medusa_core.kernels.support import launch_options, shared_memory_bytes

MAX_TREE_NODES = 64  # ancestors are bits of an int64


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTile:
    """How a launch is cut: rows (query x head) and keys of one matrix product, warps, and depth of the load pipeline.

    Rows and keys are powers of two >= 16.

    reads_ahead: a split's first keys and values are loaded into registers as soon as possible, ahead of the pipelined loop over the
        others: best where a split seldom has others. Trees only.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    reads_ahead: bool = False


class SplitWorkspace:
    """Scratch of split launches: partial results and arrival counters.

    The counters are zero between launches, which is what lets a captured launch be replayed. Launches that may overlap in time
    need a workspace each.
    """

    def __init__(self, num_partials: int, value_dim: int, device: torch.device | str) -> None:
        """
        Args:
            num_partials: the largest T * H * num_splits of any launch.
            value_dim: the largest Dv of any layer.
        """
        self.num_partials = num_partials
        self.value_dim = value_dim
        self.partials = torch.empty(num_partials * value_dim, dtype=torch.float32, device=device)
        # running maximum and sum of each partial row
        self.statistics = torch.empty(num_partials * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(num_partials, dtype=torch.int32, device=device)


# float32 products run without tensor cores, their operands in registers: larger tiles spill.
_FLOAT32_TILE = AttentionTile(block_rows=16, block_keys=32, num_warps=4, num_stages=2)
_NUM_MULTIPROCESSORS = 132  # of an H200
_MAX_SPLITS = 32
# Query rows (lanes x nodes x heads) up to which a launch is a matter of latency, up to which of both, and from which of bandwidth.
_FEW_ROWS, _SOME_ROWS, _MANY_ROWS = 256, 1024, 4096
# A launch has a program more per multiprocessor for so many rows, up to four. Fewer leave processors idle; more keep those of the
# next kernel, which would read its weights meanwhile, from starting.
_ROWS_PER_PROGRAM = 320
_MERGE_REGISTERS = 64  # of each thread, for the parts of a split context that are merged at once


def tree_tile(
    num_lanes: int,
    num_nodes: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
) -> AttentionTile:
    """The tile of a tree launch, as measured best on an H200 with 14 query and 2 KV heads of 64.

    A launch of few rows is a matter of latency: large blocks of keys, asked for ahead of the kernel before. Later smaller blocks,
    of which more fit on a multiprocessor, then loads in a pipeline alone. With many lanes and large trees a tile has more rows, so
    that keys are not read again for each tile.

    head_dim: the larger of D and Dv.
    """
    if dtype == torch.float32:
        return _FLOAT32_TILE
    num_rows = num_lanes * num_nodes * num_heads
    block_keys, num_warps = (256, 8) if num_rows <= _FEW_ROWS else (128, 4)
    if head_dim > 64:
        block_keys, num_warps = min(block_keys, 128 if head_dim <= 128 else 64), 8
    return AttentionTile(
        block_rows=_tree_block_rows(num_lanes, num_nodes, num_heads, num_kv_heads),
        block_keys=block_keys,
        num_warps=num_warps,
        num_stages=2,
        reads_ahead=num_rows <= _SOME_ROWS,
    )


def tree_splits(num_lanes: int, num_nodes: int, num_heads: int, num_kv_heads: int) -> int:
    """Into how many parts to cut each context, so that a launch has one to four programs per multiprocessor, which all run at once.

    A context too short for that many blocks of keys uses fewer parts, decided on the device.
    """
    num_rows = num_lanes * num_nodes * num_heads
    block_rows = _tree_block_rows(num_lanes, num_nodes, num_heads, num_kv_heads)
    num_tiles = triton.cdiv(num_nodes * (num_heads // num_kv_heads), block_rows)
    num_per_multiprocessor = min(4, triton.cdiv(num_rows, _ROWS_PER_PROGRAM)) if block_rows == 16 else 2
    num_programs = num_per_multiprocessor * _NUM_MULTIPROCESSORS
    return int(max(1, min(_MAX_SPLITS, num_programs // (num_lanes * num_kv_heads * num_tiles))))


def _tree_block_rows(num_lanes: int, num_nodes: int, num_heads: int, num_kv_heads: int) -> int:
    is_large_tree = num_nodes * (num_heads // num_kv_heads) >= 48
    return 64 if is_large_tree and num_lanes * num_nodes * num_heads > _MANY_ROWS else 16


def _fit(tile: AttentionTile, num_values: int, query_THD: Tensor) -> AttentionTile:
    """The tile with as many keys as the shared memory of a program holds. num_values: of a key and its value."""
    key_bytes = num_values * query_THD.element_size() * tile.num_stages
    while tile.block_keys > 16 and tile.block_keys * key_bytes > shared_memory_bytes(query_THD.device):
        tile = replace(tile, block_keys=tile.block_keys // 2)
    return tile


def chunk_tile_rows(num_heads: int, num_kv_heads: int) -> int:
    """Packed rows of a prompt tile: with the query heads of one KV head they fill a block of 64 rows."""
    return max(1, 64 // (num_heads // num_kv_heads))


def tree_attention(
    query_THD: Tensor,
    key_slots_SGD: Tensor,
    value_slots_SGD: Tensor,
    *,
    block_table_PX: Tensor,
    lane_B: Tensor,
    base_B: Tensor,
    depth_N: Tensor,
    ancestor_bits_N: Tensor,
    block_size: int,
    spare_slot: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    num_splits: int = 1,
    workspace: SplitWorkspace | None = None,
    out_THDv: Tensor | None = None,
    tile: AttentionTile | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """Attention of B trees of N nodes each, T = B * N rows, lane-major. The trees' own K/V are in the cache already.

    Node i of a lane sees every position < base, and position base + j iff bit j of its ancestor bits is set.

    Args:
        query_THD: float16, bfloat16 or float32; any strides but the last, which is 1.
        key_slots_SGD, value_slots_SGD: contiguous, the query's dtype. What lies beyond the visible slots may be NaN.
        block_table_PX: int64, block of each run of `block_size` positions; -1 = none, read as `spare_slot`.
        lane_B: int64, row of the block table of each lane of the step.
        base_B: int64, committed tokens of each lane; its nodes are at positions base .. base + N - 1 of its block table.
        depth_N: int32 or int64, depth of each node; its position in the text is base + depth.
        ancestor_bits_N: int64, bit j: node j is an ancestor of, or is, this node. The diagonal must be set.
        window: a key is visible only if query position - key position < window.
        softcap: scores become softcap * tanh(score / softcap).
        sinks_H: a logit per head that joins the softmax's denominator only.
        num_splits: parts of each context, see tree_splits. A result does not depend on the order in which programs run.
        workspace: needed if num_splits > 1; mutated, counters end at zero.
        out_THDv: written and returned if given; contiguous.
        tile: overrides tree_tile.
        use_pdl: launch while the kernel before still runs (programmatic dependent launch, sm_90 and later). That kernel, and those
            before it back to the last one that was launched without, may write queries and the trees' own K/V only: the block
            table, lanes, bases, depths, bits and committed K/V are read without waiting for them.

    Returns:
        [T, H, Dv] in the query's dtype.

    Raises:
        ValueError: too many nodes, or a workspace that is missing or too small.
    """
    num_rows, num_heads, key_dim = query_THD.shape
    num_kv_heads, value_dim = value_slots_SGD.shape[1:]
    num_lanes, num_nodes = lane_B.shape[0], depth_N.shape[0]
    if num_nodes > MAX_TREE_NODES:
        raise ValueError(f"a tree of {num_nodes} nodes; ancestor bits hold {MAX_TREE_NODES}")
    if num_splits > 1:
        _check_workspace(workspace, num_rows * num_heads * num_splits, value_dim)
    if out_THDv is None:
        out_THDv = query_THD.new_empty(num_rows, num_heads, value_dim)
    if tile is None:
        tile = tree_tile(num_lanes, num_nodes, num_heads, num_kv_heads, query_THD.dtype, max(key_dim, value_dim))
        tile = _fit(tile, key_dim + value_dim, query_THD)
    constants = _layer_constants(num_heads, num_kv_heads, key_dim, value_dim, block_size, window, softcap)
    is_split = workspace is not None and num_splits > 1
    num_repeats = num_heads // num_kv_heads
    grid = (triton.cdiv(num_nodes * num_repeats, tile.block_rows), num_splits, num_lanes * num_kv_heads)
    tree_kernel[grid](
        query_THD,
        key_slots_SGD,
        value_slots_SGD,
        out_THDv,
        block_table_PX,
        lane_B,
        base_B,
        depth_N,
        ancestor_bits_N,
        sinks_H,
        workspace.partials if workspace is not None and is_split else None,
        workspace.statistics if workspace is not None and is_split else None,
        workspace.counters if workspace is not None and is_split else None,
        query_THD.stride(0),
        query_THD.stride(1),
        block_table_PX.stride(0),
        spare_slot,
        scaling,
        num_nodes,
        IS_SPLIT=is_split,
        MERGE_SPLITS=_merge_splits(tile, constants["BLOCK_V"]),
        READ_AHEAD=tile.reads_ahead,
        USE_PDL=use_pdl,
        **constants,
        BLOCK_M=tile.block_rows,
        BLOCK_C=tile.block_keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(use_pdl),
    )
    return out_THDv


def chunk_attention(
    query_THD: Tensor,
    key_slots_SGD: Tensor,
    value_slots_SGD: Tensor,
    *,
    block_table_PX: Tensor,
    tile_lane_Q: Tensor,
    tile_row_Q: Tensor,
    tile_num_rows_Q: Tensor,
    tile_position_Q: Tensor,
    tile_rows: int,
    block_size: int,
    spare_slot: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    out_THDv: Tensor | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """Causal attention of prompt chunks, cut into Q tiles of consecutive rows. The chunks' own K/V are in the cache already.

    Tile q holds packed rows [tile_row, tile_row + tile_num_rows) of one lane, the first at position tile_position. A row sees every
    position of its lane up to its own.

    Args:
        tile_lane_Q, tile_row_Q, tile_num_rows_Q, tile_position_Q: int32. A tile of 0 rows is not used. tile_lane is a row of the
            block table.
        tile_rows: the most rows of a tile, see chunk_tile_rows.
        tile: overrides the launch's own choice.
        others: as in tree_attention.

    Returns:
        [T, H, Dv] in the query's dtype. Rows that no tile holds are left as they were.
    """
    num_rows, num_heads, key_dim = query_THD.shape
    num_kv_heads, value_dim = value_slots_SGD.shape[1:]
    if out_THDv is None:
        out_THDv = query_THD.new_empty(num_rows, num_heads, value_dim)
    num_tile_rows = tile_rows * (num_heads // num_kv_heads)
    if tile is None:
        tile = _chunk_tile(num_tile_rows, max(key_dim, value_dim), query_THD.dtype)
        tile = _fit(tile, key_dim + value_dim, query_THD)
    constants = _layer_constants(num_heads, num_kv_heads, key_dim, value_dim, block_size, window, softcap)
    chunk_kernel[(triton.cdiv(num_tile_rows, tile.block_rows), num_kv_heads, tile_row_Q.shape[0])](
        query_THD,
        key_slots_SGD,
        value_slots_SGD,
        out_THDv,
        block_table_PX,
        tile_lane_Q,
        tile_row_Q,
        tile_num_rows_Q,
        tile_position_Q,
        sinks_H,
        query_THD.stride(0),
        query_THD.stride(1),
        block_table_PX.stride(0),
        spare_slot,
        scaling,
        **constants,
        BLOCK_M=tile.block_rows,
        BLOCK_C=tile.block_keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_THDv


def _chunk_tile(num_tile_rows: int, head_dim: int, dtype: torch.dtype) -> AttentionTile:
    if dtype == torch.float32:
        return _FLOAT32_TILE
    block_rows = min(128, max(16, triton.next_power_of_2(num_tile_rows)))
    return AttentionTile(
        block_rows=block_rows,
        block_keys=128 if head_dim <= 128 else 64,
        num_warps=4 if block_rows <= 64 and head_dim <= 64 else 8,
        num_stages=2,
    )


def _merge_splits(tile: AttentionTile, block_value_dim: int) -> int:
    """How many splits a merge holds at once."""
    return max(1, min(_MAX_SPLITS, _MERGE_REGISTERS * 32 * tile.num_warps // (tile.block_rows * block_value_dim)))


def _check_workspace(workspace: SplitWorkspace | None, num_partials: int, value_dim: int) -> None:
    if workspace is None:
        raise ValueError("num_splits > 1 needs a workspace")
    if num_partials > workspace.num_partials or value_dim > workspace.value_dim:
        raise ValueError(
            f"workspace holds {workspace.num_partials} partial rows of {workspace.value_dim} values; "
            f"this launch needs {num_partials} of {value_dim}"
        )


def _layer_constants(
    num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int, block_size: int, window: int | None, softcap: float | None
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "NUM_REPEATS": num_heads // num_kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": window or 0,
        "SOFTCAP": softcap or 0.0,
        "BLOCK_D": max(16, triton.next_power_of_2(key_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }
