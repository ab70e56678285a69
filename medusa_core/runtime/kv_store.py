"""The KV cache as tensors: slots of all blocks, layer by layer, plus a spare block for writes that must go nowhere.

Shapes: S slots of the whole store ((num_blocks + 1) * block_size) · Y layers of one shape · G KV heads · D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa_core.attention.context import LayerShape


def slot_bytes(layer_shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """Bytes that one token takes in the cache, all layers."""
    return sum(heads * (key_dim + value_dim) for heads, key_dim, value_dim in layer_shapes) * dtype.itemsize


class KVStore:
    """Keys and values of all layers.

    Layers of equal shape share one tensor [Y, S, G, D], so that committing a path is one gather and one scatter for all of them.
    """

    def __init__(
        self, layer_shapes: Sequence[LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Args:
            layer_shapes: (KV heads, key dim, value dim) of each layer.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.spare_slot = num_blocks * block_size
        num_slots = self.spare_slot + block_size
        # (keys [Y, S, G, D], values [Y, S, G, Dv]) of the layers of each shape
        self.layer_groups: list[tuple[Tensor, Tensor]] = []
        self._layers: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(layer_shapes)
        for shape in dict.fromkeys(layer_shapes):
            num_heads, key_dim, value_dim = shape
            members = [idx for idx, other in enumerate(layer_shapes) if other == shape]
            # Zeros, because masked positions still enter the products: a stray NaN would survive a weight of 0.
            keys = torch.zeros(len(members), num_slots, num_heads, key_dim, dtype=dtype, device=device)
            values = torch.zeros(len(members), num_slots, num_heads, value_dim, dtype=dtype, device=device)
            self.layer_groups.append((keys, values))
            for row, layer_idx in enumerate(members):
                self._layers[layer_idx] = (keys[row], values[row])

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See attention.context.LayerCache."""
        return self._layers[layer_idx]

    def move(self, source_slots: Tensor, target_slots: Tensor) -> None:
        """Copy slots to other slots in every layer. All sources are read before any target is written, so ranges may overlap;
        equal targets must be the spare slot."""
        for group in self.layer_groups:
            for buffer in group:
                buffer[:, target_slots] = buffer[:, source_slots]

    def context_slots(self, block_table_BX: Tensor) -> Tensor:
        """Slot of each position a block table covers, int64 [B, X * block_size]; the spare slot where it has no block (-1)."""
        offsets = torch.arange(self.block_size, device=block_table_BX.device)
        slots_BXS = block_table_BX.unsqueeze(2) * self.block_size + offsets
        return torch.where(block_table_BX.unsqueeze(2) < 0, self.spare_slot, slots_BXS).flatten(1)
