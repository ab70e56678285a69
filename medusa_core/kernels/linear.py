"""The products of a decoder layer, of the output projection and of Medusa heads, with what surrounds them fused in.

Each function picks by rows and dtype: few rows of 16-bit values go through `medusa_core.kernels.skinny`, more rows (or float32)
through cuBLAS, with pointwise kernels beside it. Results differ by the order of additions, and by the roundings between a product
and what follows it, which the skinny kernel does not need.

The weight of an RMS norm is part of the product behind it (`fold_norm`): norm(x) W = x W' / rms(x) with W'[f, e] = W[f, e] *
norm_weight[e]. That rounds once (the elements of W') where the unfused modules round twice (the scaled value, then its product
with the norm's weight), so the error is smaller; and nothing needs doing to x on its way to the tensor cores.
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
from medusa_core.kernels.support import shared_memory_bytes
from medusa_core.kernels.topk import argmax_rows, best_of_keys

__all__ = [
    "MAX_SKINNY_ROWS",
    "SkinnyConfig",
    "best_output",
    "choose_config",
    "fit_config",
    "fold_norm",
    "gated_linear",
    "gated_product",
    "heads_block",
    "interleave",
    "is_skinny",
    "linear_residual",
    "norm_linear",
    "project",
    "split_counters",
]

MAX_SKINNY_ROWS = 64
# A small weight leaves cuBLAS's large tiles on too few processors, so the skinny kernel takes it up to here.
_MAX_NARROW_ROWS = 256
# A split's share of the input values, and the widest row a program takes without a loop.
_WHOLE_ROW = 1024
_LARGE_SHARE = 1280
# So many tiles keep every processor busy without splitting the input values, and without taking a row whole.
_ENOUGH_TILES = 256
# And from so many on, more outputs per program pay.
_MANY_TILES = 2048


def is_skinny(x_TE: Tensor, weight_FE: Tensor) -> bool:
    """Whether the skinny kernel takes this product."""
    num_outputs, num_inputs = weight_FE.shape[-2:]
    is_small = num_outputs < 16 * _ENOUGH_TILES and num_inputs <= _WHOLE_ROW
    max_rows = _MAX_NARROW_ROWS if is_small else MAX_SKINNY_ROWS
    return x_TE.shape[-2] <= max_rows and x_TE.dtype in (torch.float16, torch.bfloat16)


def choose_config(
    num_rows: int, num_outputs: int, num_inputs: int, *, can_split: bool = False, has_int8: bool = False
) -> SkinnyConfig:
    """The cut of a product with a weight [num_outputs, num_inputs], as measured best on an H200, for weights of 8 bits on an H100.

    It is the same for 1 to 16 rows, and for 17 to 64: within each range a row's result does not depend on the number of rows.
    """
    num_tiles = -(-num_outputs // 16)
    is_narrow = num_tiles < _ENOUGH_TILES
    split_k = min(-(-num_inputs // _WHOLE_ROW), 8) if can_split and is_narrow else 1
    share = _power_of_two(-(-num_inputs // split_k))
    block_k = min(128, share)
    if num_rows > MAX_SKINNY_ROWS:
        if num_rows <= 128:
            return SkinnyConfig(block_t=64, block_f=32, block_k=block_k, num_stages=6)
        return SkinnyConfig(block_t=64, block_f=64, block_k=block_k, num_stages=5)
    if num_rows > 16:
        if num_tiles >= _MANY_TILES:
            return SkinnyConfig(block_t=64, block_f=128, block_k=min(64, share), prefetch=False)
        if not is_narrow:
            return SkinnyConfig(block_t=64, block_f=32, block_k=block_k, num_stages=5 if has_int8 else 3)
        if split_k == 1:
            return SkinnyConfig(block_t=64, block_f=16, block_k=min(64, share), num_stages=12)
        # fewer, larger parts than for few rows: each part's sums are written and read again
        split_k = -(-num_inputs // _LARGE_SHARE)
        return SkinnyConfig(block_t=64, block_f=32, block_k=min(256, share), split_k=split_k, num_stages=3)
    if num_tiles >= _MANY_TILES:
        return SkinnyConfig(block_t=16, block_f=128, block_k=min(64, share), prefetch=False)
    if is_narrow and share <= _WHOLE_ROW:
        return SkinnyConfig(block_t=16, block_f=16, block_k=share, split_k=split_k, num_stages=1)
    if is_narrow:
        return SkinnyConfig(block_t=16, block_f=16, block_k=block_k, split_k=split_k, num_stages=5)
    return SkinnyConfig(block_t=16, block_f=64, block_k=block_k, num_stages=8 if has_int8 else 5, prefetch=False)


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())


def fold_norm(weight_FE: Tensor, norm_weight_E: Tensor) -> Tensor:
    """The weight of a product whose input an RMS norm without a weight of its own divides, rounded once to its dtype."""
    return (weight_FE.float() * norm_weight_E.float()).to(weight_FE.dtype)


def interleave(gate_IE: Tensor, up_IE: Tensor) -> Tensor:
    """[2I, E]: row 2i is gate i, row 2i + 1 up i, so that one tile holds both and one thread the pair's sums."""
    return torch.stack((gate_IE, up_IE), dim=1).flatten(0, 1)


def norm_linear(
    hidden_TE: Tensor,
    eps: float,
    weight_FE: Tensor,
    bias_F: Tensor | None = None,
    *,
    counters: Tensor | None = None,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """RMS norm, then a linear layer: [T, F] in the model's dtype.

    weight_FE: with the norm's weight in it, see `fold_norm`. counters: from `split_counters`; without, nothing is split. config:
    instead of `choose_config`'s, for measurements.
    """
    config = config or _default_config(hidden_TE, weight_FE, counters)
    if config is None:
        return functional.linear(rms_norm(hidden_TE, None, eps, use_pdl=use_pdl), weight_FE, bias_F)
    hidden_TE, norm_eps = _norm_apart(hidden_TE, eps, config, use_pdl)
    out_TF = hidden_TE.new_empty(hidden_TE.shape[0], weight_FE.shape[0])
    return skinny_product(
        hidden_TE, weight_FE, config, out=out_TF, bias=bias_F, norm_eps=norm_eps, counters=counters, use_pdl=use_pdl
    )


def gated_linear(
    hidden_TE: Tensor, eps: float, weight_2IE: Tensor, *, config: SkinnyConfig | None = None, use_pdl: bool = False
) -> Tensor:
    """RMS norm, then silu(gate) * up: [T, I].

    weight_2IE: gate and up alternate (`interleave`), with the norm's weight in them (`fold_norm`). config: as for `norm_linear`.
    """
    config = config or _default_config(hidden_TE, weight_2IE)
    if config is None:
        gate_up_T2I = functional.linear(rms_norm(hidden_TE, None, eps, use_pdl=use_pdl), weight_2IE)
        return silu_mul(gate_up_T2I, use_pdl=use_pdl)
    hidden_TE, norm_eps = _norm_apart(hidden_TE, eps, config, use_pdl)
    out_TI = hidden_TE.new_empty(hidden_TE.shape[0], weight_2IE.shape[0] // 2)
    return skinny_product(hidden_TE, weight_2IE, config, out=out_TI, epilogue="gated", norm_eps=norm_eps, use_pdl=use_pdl)


def gated_product(
    x_TE: Tensor,
    weight_2IE: Tensor,
    bias_2I: Tensor | None = None,
    *,
    scale_2I: Tensor | None = None,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """silu(gate) * up: [T, I].

    weight_2IE, bias_2I: gate and up alternate (`interleave`). scale_2I: of a weight in 8 bits (`skinny_product`), which takes up to
    MAX_SKINNY_ROWS rows of 16-bit values; ValueError for others. config: as for `norm_linear`.
    """
    config = config or _default_config(x_TE, weight_2IE)
    if config is None:
        _refuse_int8(scale_2I)
        return silu_mul(functional.linear(x_TE, weight_2IE, bias_2I), use_pdl=use_pdl)
    out_TI = x_TE.new_empty(x_TE.shape[0], weight_2IE.shape[0] // 2)
    return skinny_product(x_TE, weight_2IE, config, out=out_TI, epilogue="gated", scale=scale_2I, bias=bias_2I, use_pdl=use_pdl)


def linear_residual(
    x_TF: Tensor,
    weight_EF: Tensor,
    residual_TE: Tensor,
    bias_E: Tensor | None = None,
    *,
    scale_E: Tensor | None = None,
    counters: Tensor | None = None,
    may_overwrite: bool = False,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """residual + linear(x): [T, E].

    may_overwrite: the result may be written to the residual's memory, which saves a launch where cuBLAS does the product; else it
    is a new tensor. scale_E: as for `gated_product`. counters, config: as for `norm_linear`.
    """
    config = config or _default_config(x_TF, weight_EF, counters)
    if config is None:
        _refuse_int8(scale_E)
        if may_overwrite and bias_E is None:
            return residual_TE.addmm_(x_TF, weight_EF.t())
        return functional.linear(x_TF, weight_EF, bias_E).add_(residual_TE)
    out_TE = torch.empty_like(residual_TE)
    return skinny_product(
        x_TF,
        weight_EF,
        config,
        out=out_TE,
        epilogue="residual",
        scale=scale_E,
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
    config = config or _default_config(hidden_TE, weight_VE)
    if config is not None:
        out_TV = torch.empty(hidden_TE.shape[0], weight_VE.shape[0], dtype=torch.float32, device=hidden_TE.device)
        return skinny_product(hidden_TE, weight_VE, config, out=out_TV, bias=bias_V, use_pdl=use_pdl)
    if hidden_TE.dtype != torch.float32 and hidden_TE.is_cuda:
        logits_TV = torch.mm(hidden_TE, weight_VE.t(), out_dtype=torch.float32)
        return logits_TV if bias_V is None else logits_TV.add_(bias_V)
    return functional.linear(hidden_TE, weight_VE, bias_V).float()


def best_output(
    hidden_TE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None = None,
    *,
    config: SkinnyConfig | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """Where each row of `project` is largest, int64 [T], the first among equals: the logits themselves are never written, where
    the skinny kernel takes the product."""
    config = config or _default_config(hidden_TE, weight_VE)
    if config is None:
        return argmax_rows(project(hidden_TE, weight_VE, bias_V))
    num_tiles = -(-weight_VE.shape[0] // config.block_f)
    keys_TJ = torch.empty(hidden_TE.shape[0], num_tiles, dtype=torch.int64, device=hidden_TE.device)
    skinny_product(hidden_TE, weight_VE, config, out=keys_TJ, epilogue="best", bias=bias_V, use_pdl=use_pdl)
    return best_of_keys(keys_TJ, use_pdl=use_pdl)


def heads_block(
    x_KTE: Tensor, weight_KEE: Tensor, bias_KE: Tensor | None = None, *, config: SkinnyConfig | None = None, use_pdl: bool = False
) -> Tensor:
    """One residual block of all Medusa heads, x + silu(linear(x)): [K, T, E]. `x_KTE` may be one hidden state expanded over K."""
    config = config or _default_config(x_KTE, weight_KEE)
    if config is None:
        weight_KEE = weight_KEE.transpose(1, 2)
        y_KTE = torch.bmm(x_KTE, weight_KEE) if bias_KE is None else torch.baddbmm(bias_KE.unsqueeze(1), x_KTE, weight_KEE)
        return x_KTE + functional.silu(y_KTE)
    out_KTE = torch.empty(x_KTE.shape, dtype=x_KTE.dtype, device=x_KTE.device)
    return skinny_product(x_KTE, weight_KEE, config, out=out_KTE, epilogue="block", bias=bias_KE, use_pdl=use_pdl)


def _default_config(x_TE: Tensor, weight_FE: Tensor, counters: Tensor | None = None) -> SkinnyConfig | None:
    """None: cuBLAS does it."""
    if not is_skinny(x_TE, weight_FE):
        return None
    num_outputs, num_inputs = weight_FE.shape[-2:]
    config = choose_config(
        x_TE.shape[-2], num_outputs, num_inputs, can_split=counters is not None, has_int8=weight_FE.dtype == torch.int8
    )
    return fit_config(config, shared_memory_bytes(x_TE.device))


def fit_config(config: SkinnyConfig, shared_bytes: int, *, keeps_outputs: bool = False) -> SkinnyConfig:
    """The config with as many stages, then as many outputs (unless it keeps them) and inputs at once, as the shared memory of a
    program holds (16-bit values)."""
    while config.shared_bytes > shared_bytes and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    while config.shared_bytes > shared_bytes and config.block_f > 16 and not keeps_outputs:
        config = replace(config, block_f=config.block_f // 2)
    while config.shared_bytes > shared_bytes and config.block_k > 64:
        config = replace(config, block_k=config.block_k // 2)
    return config


def _refuse_int8(scale: Tensor | None) -> None:
    if scale is not None:
        raise ValueError(f"Weights of 8 bits are multiplied with up to {MAX_SKINNY_ROWS} rows of 16-bit values.")


def _norm_apart(hidden_TE: Tensor, eps: float, config: SkinnyConfig, use_pdl: bool) -> tuple[Tensor, float | None]:
    """(input of the product, epsilon if the product takes the norm): the norm is a launch of its own where it does not."""
    if config.can_take_norm(hidden_TE.shape[1]):
        return hidden_TE, eps
    return rms_norm(hidden_TE, None, eps, use_pdl=use_pdl), None
