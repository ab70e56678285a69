"""Drafting with few, short launches: what sequential heads do for a few lanes on a GPU.

A level of a tree costs the time to read the heads' weights, and the start of every launch between two of them. So weights are kept
in 8 bits, half the bytes to read, and a second-level cache holds more of them until the next level; and no level writes logits or
looks for their best: each tile of the output product keeps its two best as keys (kernels/near_top.py), the next level finds its
tokens among them, and what is left for all levels together is one launch that makes lists of them.

Rounding makes a guess a little worse now and then, never an answer. Import this module only where kernels run.

Shapes: B lanes · m, n nodes with children on one level and the next · R = n * B rows · L all nodes with children · J keys ·
C candidates · E hidden · V draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medusa_core.kernels.head_inputs import join_inputs
from medusa_core.kernels.linear import MAX_SKINNY_ROWS, gated_product, linear_residual, split_counters
from medusa_core.kernels.near_top import MIN_OUTPUTS, TILE_KEYS, near_top_keys, num_keys, spread_order
from medusa_core.kernels.support import can_overlap_launches
from medusa_core.kernels.topk import candidates_of_keys
from medusa_core.model.int8_linear import to_int8
from medusa_core.model.loader import LoadedModel
from medusa_core.model.sequential_heads import RMS_EPS, GatedBlock, SequentialHeads
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.drafter import SequentialDrafter


def suits(heads: SequentialHeads, loaded: LoadedModel) -> bool:
    """Whether `KernelDrafter` can draft with these heads: sequential ones of one gated block in 16 bits, before an output layer
    that they share, uncorrected and large enough."""
    shape = heads.shape
    linear = (heads.draft_projection or loaded.project).linear
    return (
        shape.is_sequential
        and shape.num_layers == 1
        and shape.output == "shared"
        and not shape.has_correction
        and isinstance(linear, nn.Linear)
        and linear.weight.dtype in (torch.float16, torch.bfloat16)
        and linear.out_features >= MIN_OUTPUTS
    )


class KernelDrafter(SequentialDrafter):
    """See the module. Levels of more rows than the kernels are made for, and trees that want more candidates of a node than there
    are tiles, are drafted the plain way.

    Args:
        heads: that `suits` accepts.
    """

    def __init__(self, heads: SequentialHeads, loaded: LoadedModel) -> None:
        super().__init__(heads, loaded)
        linear = (heads.draft_projection or loaded.project).linear
        device = linear.weight.device
        order_V = spread_order(linear.out_features).to(device)
        self._output = _Int8Weight.of(linear.weight.detach()[order_V])
        self._output_bias_V = None if linear.bias is None else linear.bias.detach()[order_V]
        self._token_map_V = order_V if heads.token_map_V is None else heads.token_map_V[order_V]
        self._blocks = [_Int8Block.of(blocks[0]) for blocks in heads.blocks]  # type: ignore[index]
        self._shares_blocks = heads.shape.shares_blocks
        self._embedding_UE = loaded.model.get_input_embeddings().weight
        self._counters = split_counters(device)
        self._use_pdl = can_overlap_launches(device)

    def __call__(self, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree) -> Tensor:
        num_lanes = hidden_BE.shape[0]
        level_sizes = [len(parent_n) for parent_n, _ in tree.inner_levels]
        num_tiles = num_keys(len(self._token_map_V)) // TILE_KEYS
        if num_lanes * max(level_sizes) > MAX_SKINNY_ROWS or tree.max_rank >= num_tiles:
            return super().__call__(hidden_BE, root_B, tree)
        use_pdl = self._use_pdl
        keys_LBJ = root_B.new_empty(sum(level_sizes), num_lanes, num_keys(len(self._token_map_V)))
        # the root's token is the only candidate that the first level knows
        state_mBE, candidates_mBC = hidden_BE.unsqueeze(0), root_B.view(1, -1, 1)
        for head, (keys_nBJ, (parent_n, rank_n)) in enumerate(
            zip(torch.split(keys_LBJ, level_sizes), tree.inner_levels, strict=True)
        ):
            x_RE, input_RF, _ = join_inputs(
                state_mBE,
                candidates_mBC,
                parent_n,
                rank_n,
                self._embedding_UE,
                eps=RMS_EPS,
                has_keys=head > 0,
                token_map_V=self._token_map_V,
                use_pdl=use_pdl,
            )
            block = self._blocks[0 if self._shares_blocks else head]
            act_RI = gated_product(
                input_RF,
                block.gate_up.weight_FE,
                block.bias_SJ[head if self._shares_blocks else 0],
                scale_2I=block.gate_up.scale_F,
                use_pdl=use_pdl,
            )
            state_RE = linear_residual(
                act_RI, block.down.weight_FE, x_RE, scale_E=block.down.scale_F, counters=self._counters, use_pdl=use_pdl
            )
            near_top_keys(
                state_RE,
                self._output.weight_FE,
                scale_V=self._output.scale_F,
                bias_V=self._output_bias_V,
                out_RJ=keys_nBJ.flatten(0, 1),
                use_pdl=use_pdl,
            )
            state_mBE, candidates_mBC = state_RE.view(len(parent_n), num_lanes, -1), keys_nBJ
        lists_QC = candidates_of_keys(keys_LBJ.flatten(0, 1), tree.max_rank + 1, token_map_V=self._token_map_V, use_pdl=use_pdl)
        return lists_QC.view(*keys_LBJ.shape[:2], -1).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Int8Weight:
    """int8 [F, E] with a scale per row, float32 [F]."""

    weight_FE: Tensor
    scale_F: Tensor

    @classmethod
    def of(cls, weight_FE: Tensor) -> _Int8Weight:
        return cls(*to_int8(weight_FE))


@dataclass(frozen=True, slots=True)
class _Int8Block:
    """`GatedBlock` in 8 bits."""

    gate_up: _Int8Weight
    down: _Int8Weight
    bias_SJ: Tensor

    @classmethod
    def of(cls, block: GatedBlock) -> _Int8Block:
        gate_up, down = block.get_parameter("gate_up.weight"), block.get_parameter("down.weight")
        return cls(_Int8Weight.of(gate_up.detach()), _Int8Weight.of(down.detach()), block.bias_SJ.detach())
