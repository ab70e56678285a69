"""Weights in 8 bits for drafting, and linear layers of them on a CPU.

There are fewer bytes to read, and a guess that is a little off costs speed, never exactness.
"""

# Shape suffixes: R rows · E inputs · F outputs

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_TOLERANCE = 0.05
# What stands for 0 among inputs of 8 bits without a sign.
_ZERO = 128
_NUM_ROWS_AT_ONCE = 4096


def to_int8(weight_FE: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [F, E], float32 [F]): the nearest multiples of each row's scale, which is its largest value / 127."""
    scale_F = weight_FE.abs().amax(dim=1).float().clamp(min=1e-12) / 127.0
    rounded_FE = torch.empty(weight_FE.shape, dtype=torch.int8, device=weight_FE.device)
    # a part at a time, as float32 takes four times the room
    for begin in range(0, len(weight_FE), _NUM_ROWS_AT_ONCE):
        rows = slice(begin, begin + _NUM_ROWS_AT_ONCE)
        rounded_FE[rows] = (weight_FE[rows].float() / scale_F[rows, None]).round()
    return rounded_FE, scale_F


class Int8Linear(nn.Module):
    """A linear layer without bias on a CPU, rounded to 8 bits: weights once, inputs each time. Its results are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_FE, self._scale_F = to_int8(linear.weight.detach())
        self._zero_F = torch.zeros(len(weight_FE), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(weight_FE, None)

    def forward(self, x_RE: Tensor) -> Tensor:
        """float32 [R, F]."""
        wide_RE = x_RE.float()
        scale = max(wide_RE.abs().amax().item() / 127.0, 1e-12)
        rounded_RE = (wide_RE / scale + _ZERO).round().to(torch.uint8)
        out_RF: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded_RE, scale, _ZERO, self._packed, self._scale_F, self._zero_F, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out_RF


@torch.inference_mode()
def as_int8(linear: nn.Module) -> nn.Module:
    """The layer in 8 bits; the layer itself where this build of torch has no such products, or they differ by too much."""
    if type(linear) is not nn.Linear or linear.bias is not None or linear.weight.device.type != "cpu":
        return linear
    try:
        rounded = Int8Linear(linear)
        x_RE = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(0)).to(linear.weight.dtype)
        expected_RF = linear(x_RE).float()
        error = ((rounded(x_RE) - expected_RF).norm() / expected_RF.norm().clamp(min=1e-9)).item()
    except (RuntimeError, AttributeError) as problem:
        logger.info("Drafting stays in %s: %s", linear.weight.dtype, problem)
        return linear
    return rounded if error <= _TOLERANCE else linear
