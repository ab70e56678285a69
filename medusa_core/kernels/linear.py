"""The products of a decoder layer, of the output projection and of Medusa heads, with what surrounds them fused in.

Each function picks by rows and dtype: up to 64 rows of 16-bit values go through `medusa_core.kernels.skinny`, more rows (or
float32) through cuBLAS, with pointwise kernels beside it. Both round alike, so results differ by the order of additions only.
"""

# Shape suffixes: T rows · E hidden · F outputs · I intermediate size · V vocabulary · K heads

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.kernels.norm import rms_norm
from medusa_core.kernels.pointwise import silu_mul
from medusa_core.kernels.skinny import SkinnyConfig, skinny_product, split_counters

__all__ = [
    "MAX_SKINNY_ROWS",
    "SkinnyConfig",
    "choose_config",
    "gated_linear",
    "heads_block",
    "is_skinny",
    "linear_residual",
    "norm_linear",
    "project",
    "split_counters",
]

MAX_SKINNY_ROWS = 64
# A split's share of the input values, and the widest row a program takes without a loop.
_WHOLE_ROW = 1024
# So many tiles keep every processor busy without splitting the input values.
_ENOUGH_TILES = 256


def is_skinny(x_TE: Tensor) -> bool:
    """Whether the skinny kernel takes this input."""
    return x_TE.shape[-2] <= MAX_SKINNY_ROWS and x_TE.dtype in (torch.float16, torch.bfloat16)


def choose_config(num_rows: int, num_outputs: int, num_inputs: int, *, is_gated: bool = False) -> SkinnyConfig:
    """The cut of a product. How the input values are split never depends on `num_rows`; the order of additions inside a split
    changes once, beyond 16 rows, where a program no longer holds its share of all rows."""
    num_tiles = -(-num_outputs // 16)
    can_split = not is_gated and num_inputs > _WHOLE_ROW and num_tiles < _ENOUGH_TILES
    split_k = min(-(-num_inputs // _WHOLE_ROW), 8) if can_split else 1
    share = _power_of_two(-(-num_inputs // split_k))
    block_t = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    if num_tiles >= 16 * _ENOUGH_TILES:
        return SkinnyConfig(block_t=block_t, block_f=64, block_k=min(128, share), num_warps=4, num_stages=4)
    if block_t == 16 and share <= _WHOLE_ROW:
        return SkinnyConfig(block_t=16, block_f=16, block_k=share, split_k=split_k, num_warps=8, num_stages=1)
    block_f = 16 if num_tiles < _ENOUGH_TILES else 32
    return SkinnyConfig(block_t=block_t, block_f=block_f, block_k=min(128, share), split_k=split_k, num_stages=5)


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())


def norm_linear(
    hidden_TE: Tensor,
    norm_weight_E: Tensor,
    eps: float,
    weight_FE: Tensor,
    bias_F: Tensor | None = None,
    *,
    counters: Tensor | None = None,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """RMS norm, then a linear layer: [T, F] in the model's dtype.

    counters: from `split_counters`, for configs that split. config: instead of `choose_config`'s, for measurements.
    """
    if not is_skinny(hidden_TE):
        return functional.linear(rms_norm(hidden_TE, norm_weight_E, eps), weight_FE, bias_F)
    config = _config(config, hidden_TE, weight_FE.shape[0], counters)
    return skinny_product(
        hidden_TE,
        weight_FE,
        config,
        out=_like(hidden_TE, weight_FE.shape[0]),
        bias=bias_F,
        norm_weight_E=norm_weight_E,
        eps=eps,
        counters=counters,
        use_pdl=use_pdl,
    )


def gated_linear(
    hidden_TE: Tensor,
    norm_weight_E: Tensor,
    eps: float,
    weight_2IE: Tensor,
    *,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """RMS norm, then silu(gate) * up: [T, I]. Rows 0..I-1 of the weight are the gate, the others up."""
    num_outputs = weight_2IE.shape[0] // 2
    if not is_skinny(hidden_TE):
        return silu_mul(functional.linear(rms_norm(hidden_TE, norm_weight_E, eps), weight_2IE))
    return skinny_product(
        hidden_TE,
        weight_2IE,
        config or choose_config(hidden_TE.shape[0], num_outputs, hidden_TE.shape[1], is_gated=True),
        out=_like(hidden_TE, num_outputs),
        epilogue="gated",
        norm_weight_E=norm_weight_E,
        eps=eps,
        use_pdl=use_pdl,
    )


def linear_residual(
    x_TF: Tensor,
    weight_EF: Tensor,
    residual_TE: Tensor,
    bias_E: Tensor | None = None,
    *,
    counters: Tensor | None = None,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """residual + linear(x): [T, E], a new tensor. counters, config: as for `norm_linear`."""
    if not is_skinny(x_TF):
        return functional.linear(x_TF, weight_EF, bias_E).add_(residual_TE)
    return skinny_product(
        x_TF,
        weight_EF,
        _config(config, x_TF, weight_EF.shape[0], counters),
        out=_like(x_TF, weight_EF.shape[0]),
        epilogue="residual",
        bias=bias_E,
        residual=residual_TE,
        counters=counters,
        use_pdl=use_pdl,
    )


def project(
    hidden_TE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None = None,
    *,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """Logits float32 [T, V], straight from the float32 sums; 16-bit weights are never rounded to on the way."""
    num_rows, num_tokens = hidden_TE.shape[0], weight_VE.shape[0]
    if is_skinny(hidden_TE):
        out_TV = torch.empty(num_rows, num_tokens, dtype=torch.float32, device=hidden_TE.device)
        config = config or replace(choose_config(num_rows, num_tokens, hidden_TE.shape[1]), split_k=1)
        return skinny_product(hidden_TE, weight_VE, config, out=out_TV, bias=bias_V, use_pdl=use_pdl)
    if hidden_TE.dtype != torch.float32 and hidden_TE.is_cuda:
        logits_TV = torch.mm(hidden_TE, weight_VE.t(), out_dtype=torch.float32)
        return logits_TV if bias_V is None else logits_TV.add_(bias_V)
    return functional.linear(hidden_TE, weight_VE, bias_V).float()


def heads_block(
    x_KTE: Tensor, weight_KEE: Tensor, bias_KE: Tensor | None = None, *, config: SkinnyConfig | None = None, use_pdl: bool = False
) -> Tensor:
    """One residual block of all Medusa heads, x + silu(linear(x)): [K, T, E]. `x_KTE` may be one hidden state expanded over K."""
    if not is_skinny(x_KTE):
        weight_KEE = weight_KEE.transpose(1, 2)
        y_KTE = torch.bmm(x_KTE, weight_KEE) if bias_KE is None else torch.baddbmm(bias_KE.unsqueeze(1), x_KTE, weight_KEE)
        return x_KTE + functional.silu(y_KTE)
    num_heads, num_rows, hidden_size = x_KTE.shape
    out_KTE = torch.empty(num_heads, num_rows, hidden_size, dtype=x_KTE.dtype, device=x_KTE.device)
    config = config or replace(choose_config(num_rows, hidden_size, hidden_size), split_k=1)
    return skinny_product(x_KTE, weight_KEE, config, out=out_KTE, epilogue="block", bias=bias_KE, use_pdl=use_pdl)


def _config(config: SkinnyConfig | None, x_TE: Tensor, num_outputs: int, counters: Tensor | None) -> SkinnyConfig:
    config = config or choose_config(x_TE.shape[0], num_outputs, x_TE.shape[1])
    return config if counters is not None else replace(config, split_k=1)


def _like(x_TE: Tensor, num_outputs: int) -> Tensor:
    return torch.empty(x_TE.shape[0], num_outputs, dtype=x_TE.dtype, device=x_TE.device)
