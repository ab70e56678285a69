"""Skinny products against torch: every fusion, odd sizes, splits, any number of rows."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from medusa_core.kernels import linear
from medusa_core.kernels.linear import SkinnyConfig
from tests import options

EPS = 1e-5
# float16 on both, since the interpreter's bfloat16 is slow and the kernel the same
DTYPES = [torch.float16] if options.device == "cpu" else [torch.float16, torch.bfloat16]
LOOPED = SkinnyConfig(block_t=16, block_f=32, block_k=32, num_stages=2)
# (E, F): neither a multiple of a block, both, and wide enough that the default splits
SIZES = [(48, 40), (128, 64), (2112, 48)]


def randn(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(options.device, dtype)


def assert_near(actual, expected, dtype):
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def normed(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def exact_linear(x, weight, bias=None):
    """A product summed in float32 whatever the device, rounded once."""
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def counters():
    return linear.split_counters(torch.device(options.device))


@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
@pytest.mark.parametrize("num_rows", [1, 5, 33])
@pytest.mark.parametrize("config", [None, LOOPED, replace(LOOPED, split_k=3)], ids=["default", "looped", "split"])
def test_norm_linear_equals_norm_then_linear(num_inputs, num_outputs, num_rows, config, dtype, counters):
    x = randn(num_rows, num_inputs, dtype=dtype)
    norm_weight, bias = randn(num_inputs, dtype=dtype, seed=1), randn(num_outputs, dtype=dtype, seed=2)
    weight = randn(num_outputs, num_inputs, dtype=dtype, seed=3, scale=num_inputs**-0.5)
    actual = linear.norm_linear(x, norm_weight, EPS, weight, bias, counters=counters, config=config)
    assert_near(actual, exact_linear(normed(x, norm_weight), weight, bias), dtype)
    assert not counters.any()


@pytest.mark.parametrize("num_rows", [1, 16, 17, 70])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES[:2])
def test_gated_linear_equals_the_unfused_mlp(num_inputs, num_outputs, num_rows, dtype):
    x, norm_weight = randn(num_rows, num_inputs, dtype=dtype), randn(num_inputs, dtype=dtype, seed=1)
    weight = randn(2 * num_outputs, num_inputs, dtype=dtype, seed=2, scale=num_inputs**-0.5)
    gate, up = exact_linear(normed(x, norm_weight), weight).chunk(2, dim=1)
    assert_near(linear.gated_linear(x, norm_weight, EPS, weight), functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("num_rows", [1, 5, 64, 65])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_residual_adds_to_the_rounded_product(num_inputs, num_outputs, num_rows, has_bias, dtype, counters):
    x, residual = randn(num_rows, num_inputs, dtype=dtype), randn(num_rows, num_outputs, dtype=dtype, seed=1)
    weight = randn(num_outputs, num_inputs, dtype=dtype, seed=2, scale=num_inputs**-0.5)
    bias = randn(num_outputs, dtype=dtype, seed=3) if has_bias else None
    before = residual.clone()
    actual = linear.linear_residual(x, weight, residual, bias, counters=counters)
    assert_near(actual, residual + exact_linear(x, weight, bias), dtype)
    assert torch.equal(residual, before)
    assert not counters.any()


@pytest.mark.parametrize("num_rows", [1, 20, 70])
def test_project_keeps_the_float32_sums(num_rows, dtype):
    x, weight = randn(num_rows, 48, dtype=dtype), randn(130, 48, dtype=dtype, seed=1)
    bias = randn(130, dtype=dtype, seed=2)
    for case in (None, bias):
        actual = linear.project(x, weight, case)
        expected = functional.linear(x.float(), weight.float(), None if case is None else case.float())
        assert actual.dtype == torch.float32
        # more rows than the kernel takes are rounded on a CPU, which has no product of 16-bit values with float32 results
        assert_near(actual, expected, dtype if options.device == "cpu" and num_rows > linear.MAX_SKINNY_ROWS else torch.float32)


@pytest.mark.parametrize("num_rows", [1, 18, 65])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_shared", [True, False])
def test_heads_block_runs_every_head_on_its_own_weight(num_rows, has_bias, is_shared, dtype):
    num_heads, size = 3, 48
    weight = randn(num_heads, size, size, dtype=dtype, scale=size**-0.5)
    bias = randn(num_heads, size, dtype=dtype, seed=1) if has_bias else None
    x = randn(num_rows, size, dtype=dtype, seed=2).expand(num_heads, -1, -1)
    x = x if is_shared else randn(num_heads, num_rows, size, dtype=dtype, seed=3)
    expected = torch.stack(
        [x[k] + functional.silu(exact_linear(x[k], weight[k], None if bias is None else bias[k])) for k in range(num_heads)]
    )
    assert_near(linear.heads_block(x, weight, bias), expected, dtype)


@pytest.mark.parametrize("config", [None, replace(LOOPED, split_k=2)], ids=["default", "split"])
def test_a_rows_result_does_not_depend_on_its_company(config, dtype, counters):
    num_inputs = 1280
    x, weight = randn(64, num_inputs, dtype=dtype), randn(48, num_inputs, dtype=dtype, seed=1, scale=num_inputs**-0.5)
    residual = torch.zeros(64, 48, dtype=dtype, device=options.device)
    whole = linear.linear_residual(x, weight, residual, counters=counters, config=config)
    few = linear.linear_residual(x[:16], weight, residual[:16], counters=counters, config=config)
    # the default's blocks change beyond 16 rows, and with them the order of additions
    assert_near(few, whole[:16], dtype)
    for num_rows, same in ((1, few), (9, few), (17, whole), (40, whole)):
        part = linear.linear_residual(x[:num_rows], weight, residual[:num_rows], counters=counters, config=config)
        if config is not None or num_rows <= 16:
            assert torch.equal(part, same[:num_rows])
        assert_near(part, same[:num_rows], dtype)


def test_float32_goes_through_the_library():
    x, norm_weight = randn(3, 48, dtype=torch.float32), randn(48, dtype=torch.float32, seed=1)
    weight = randn(80, 48, dtype=torch.float32, seed=2)
    assert_near(linear.norm_linear(x, norm_weight, EPS, weight), functional.linear(normed(x, norm_weight), weight), torch.float32)
    gate, up = functional.linear(normed(x, norm_weight), weight).chunk(2, dim=1)
    assert_near(linear.gated_linear(x, norm_weight, EPS, weight), functional.silu(gate) * up, torch.float32)


def test_a_split_product_without_counters_is_refused(dtype):
    x, weight = randn(1, 512, dtype=dtype), randn(16, 512, dtype=dtype)
    with pytest.raises(ValueError, match="counter"):
        linear.skinny_product(x, weight, replace(LOOPED, split_k=2), out=torch.empty(1, 16, dtype=dtype, device=x.device))


def test_rows_that_are_not_contiguous_are_refused(dtype):
    x, weight = randn(4, 512, dtype=dtype), randn(16, 256, dtype=dtype)
    with pytest.raises(ValueError, match="contiguous"):
        linear.project(x[:, :256], weight)


def test_every_default_config_is_one_the_kernel_takes():
    for num_rows in (1, 16, 17, 64):
        for num_inputs, num_outputs in ((48, 40), (896, 1152), (4864, 896), (4096, 6144), (14336, 4096), (896, 151936)):
            config = linear.choose_config(num_rows, num_outputs, num_inputs)
            assert config.block_t >= min(num_rows, 64)
            for block in (config.block_t, config.block_f, config.block_k):
                assert block >= 16
                assert block & (block - 1) == 0
            same_for_all = linear.choose_config(1, num_outputs, num_inputs)
            assert config.split_k == same_for_all.split_k
