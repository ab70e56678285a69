"""Nearly the best candidates of draft logits, without writing the logits.

Each tile of outputs of the product keeps its two best as keys (`topk.pack`), and whoever wants a row's candidates looks for them
among the tiles' keys. That misses a candidate only where three of the wanted ones fall into one tile, so outputs that are likely
together have to be in different tiles: `spread_order`. A draft that is missed costs a little speed, never exactness.

Shapes: R rows · E inputs · V outputs (draft vocabulary) · J keys of a row · C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_core.kernels.linear import fit_config
from medusa_core.kernels.skinny import SkinnyConfig, skinny_product
from medusa_core.kernels.support import shared_memory_bytes

TILE_LEN = 128
TILE_KEYS = 2
# With so many tiles, three of ten candidates meet in one of them in about three lists of a hundred.
MIN_OUTPUTS = 64 * TILE_LEN
# As measured best on an H100, for weights of 8 bits.
_FEW_ROWS = SkinnyConfig(block_t=16, block_f=TILE_LEN, block_k=128, num_stages=5)
_MORE_ROWS = SkinnyConfig(block_t=64, block_f=TILE_LEN, block_k=128, num_stages=4, prefetch=False)


def num_keys(num_outputs: int) -> int:
    """J."""
    return -(-num_outputs // TILE_LEN) * TILE_KEYS


def spread_order(num_outputs: int) -> Tensor:
    """In which order to lay out the outputs, int64 [V], so that neighbours are in different tiles: the ids of a BPE vocabulary are
    its merges by frequency, behind digits and letters."""
    num_tiles = num_keys(num_outputs) // TILE_KEYS
    place = torch.arange(num_tiles * TILE_LEN)
    order = place % TILE_LEN * num_tiles + place // TILE_LEN
    # the last tile may be short: what lies beyond the end is left out
    return order[order < num_outputs]


def near_top_keys(
    x_RE: Tensor,
    weight_VE: Tensor,
    *,
    scale_V: Tensor | None = None,
    bias_V: Tensor | None = None,
    out_RJ: Tensor,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """Keys of the best outputs of each tile, best first, written to out_RJ, int64 [R, J].

    weight_VE, scale_V, bias_V, use_pdl: as for `skinny_product`. config: another cut than the default, for measurements; its
    block_f must be TILE_LEN. Raises ValueError for another, or an out_RJ of another shape.
    """
    if config is None:
        config = _FEW_ROWS if len(x_RE) <= _FEW_ROWS.block_t else _MORE_ROWS
        config = fit_config(config, shared_memory_bytes(x_RE.device), keeps_outputs=True)
    if config.block_f != TILE_LEN:
        raise ValueError(f"A tile has {TILE_LEN} outputs, not {config.block_f}.")
    if out_RJ.shape != (len(x_RE), num_keys(len(weight_VE))):
        raise ValueError(f"out_RJ is {list(out_RJ.shape)} instead of {[len(x_RE), num_keys(len(weight_VE))]}.")
    return skinny_product(x_RE, weight_VE, config, out=out_RJ, epilogue="top", scale=scale_V, bias=bias_V, use_pdl=use_pdl)
