"""The start-up check of runtime/self_check.py for what captured steps run on: the kernels, and layers that were fused."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from medusa_core.attention.context import LayerShape
from medusa_core.attention.kernel_context import BlockTables, chunk_context, tree_context
from medusa_core.kernels.attention import SplitWorkspace
from medusa_core.kernels.support import can_overlap_launches
from medusa_core.model.attention_hook import forward_hidden
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.self_check import CHECK_BLOCK_SIZE, CHECK_TREE, AttentionReference, compare
from medusa_core.speculation.device_tree import DeviceTree


@torch.inference_mode()
def check_kernels(
    model: PreTrainedModel, reference: AttentionReference, layer_shapes: list[LayerShape], tile_rows: int, workspace: SplitWorkspace
) -> None:
    """As `check_attention`, for the kernels and fused layers that captured steps run on. Raises UnsupportedModelError."""
    device = model.device
    prefix_len, num_nodes = reference.prefix_TE.shape[0], CHECK_TREE.num_nodes
    num_blocks = -(-(prefix_len + num_nodes) // CHECK_BLOCK_SIZE)
    store = KVStore(layer_shapes, num_blocks, CHECK_BLOCK_SIZE, model.dtype, device)
    table_PX = torch.arange(num_blocks, device=device).flip(0).unsqueeze(0)
    tables = BlockTables(table_PX=table_PX, block_size=CHECK_BLOCK_SIZE, spare_slot=store.spare_slot)
    slots = store.context_slots(table_PX)[0]
    tree = DeviceTree.create(CHECK_TREE, device)
    position = torch.arange(prefix_len, device=device)

    tiles = [(0, row, min(tile_rows, prefix_len - row), row) for row in range(0, prefix_len, tile_rows)]
    tiles_4Q = torch.tensor(tiles, dtype=torch.int32, device=device).T.contiguous()
    context = chunk_context(store, slots[:prefix_len], tables, tiles_4Q=tiles_4Q, tile_rows=tile_rows)
    prefix_hidden = forward_hidden(model, reference.token_ids[:prefix_len], position, context)
    context = tree_context(
        store,
        slots[prefix_len : prefix_len + num_nodes],
        tables,
        lane_B=torch.zeros(1, dtype=torch.int64, device=device),
        base_B=torch.full((1,), prefix_len, device=device),
        depth_N=tree.depth_N,
        ancestor_bits_N=tree.ancestor_bits_N,
        workspace=workspace,
        use_pdl=can_overlap_launches(device),
    )
    tree_hidden = forward_hidden(model, reference.token_ids[prefix_len:], prefix_len + tree.depth_N, context)
    compare(model, "a prompt in kernels", prefix_hidden, reference.prefix_TE)
    compare(model, "a tree of draft tokens in kernels", tree_hidden, reference.tree_NE)
