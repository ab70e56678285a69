"""Linear layers with their weights laid out once for the CPU's sixteen-bit matrix products.

`torch.nn.Linear` in bfloat16 on a CPU lays its weight out anew in every call of more than one row, and the rows of a tree are what
this engine is about. oneDNN can keep the blocked layout; torch offers it through the operators its compiler uses. Each layer
is compared with the original on random input before it takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medusa_core.errors import UnsupportedModelError

# The row count oneDNN chooses the layout for; measured fastest or equal from 1 to 64 rows.
_LAYOUT_ROWS = 16
_TOLERANCE = 0.01


class PackedLinear(nn.Module):
    """A linear layer that owns the packed weight only. Same results as the layer it was made from, up to rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _LAYOUT_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed_weight, self.bias, "none", [], "")
        return out


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch can pack weights of `dtype` on `device`."""
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def pack_linears(modules: Sequence[nn.Module]) -> int:
    """Replace every plain nn.Linear inside `modules`; returns how many. A layer found in several places stays one layer.

    Raises UnsupportedModelError if a packed layer computes something else than the original.
    """
    packed: dict[int, PackedLinear] = {}
    originals: list[nn.Linear] = []  # keeps ids unique until all are replaced
    for root in modules:
        for parent in list(root.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is not nn.Linear:
                    continue
                if id(child) not in packed:
                    packed[id(child)] = _checked(child)
                    originals.append(child)
                setattr(parent, name, packed[id(child)])
    return len(packed)


@torch.inference_mode()
def _checked(linear: nn.Linear) -> PackedLinear:
    packed = PackedLinear(linear)
    x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(0)).to(linear.weight.dtype)
    expected = linear(x).float()
    error = ((packed(x).float() - expected).norm() / expected.norm().clamp(min=1e-9)).item()
    if not error <= _TOLERANCE:
        raise UnsupportedModelError(
            f"A packed linear layer of {linear.in_features} x {linear.out_features} differs from the original by {error:.2g}.",
            hint="Serve in --dtype float32.",
        )
    return packed
