"""Row kernels against torch, with the modules' rounding."""

import pytest
import torch
from torch.nn import functional

from medusa_core.kernels.norm import rms_norm
from medusa_core.kernels.pointwise import silu_mul
from tests import options

DTYPES = [torch.float32, torch.float16] + ([] if options.device == "cpu" else [torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "num_values"), [(1, 48), (7, 896), (3, 64)])
def test_rms_norm_rounds_like_the_module(num_rows, num_values, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(num_rows, num_values, generator=generator) * 3).to(options.device, dtype)
    weight = torch.randn(num_values, generator=generator).to(options.device, dtype)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    actual = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(actual, expected)
    # bitwise but for the few values whose float32 statistics round across a boundary
    assert dtype == torch.float32 or (actual == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_without_a_weight_rounds_once(dtype):
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)).to(options.device, dtype)
    wide = x.double()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    torch.testing.assert_close(rms_norm(x, None, 1e-5), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 48), (5, 1025)])
def test_silu_mul_takes_gate_and_up_in_turn(num_rows, width, dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_rows, 2 * width, generator=generator).to(options.device, dtype)
    gate, up = gate_up.float().view(num_rows, width, 2).unbind(-1)
    torch.testing.assert_close(silu_mul(gate_up), (functional.silu(gate) * up).to(dtype))
