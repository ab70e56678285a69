"""Skinny products against torch: every fusion, odd sizes, splits, any number of rows."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from medusa_core.kernels import linear
from medusa_core.kernels.linear import SkinnyConfig
from medusa_core.kernels.skinny import skinny_product
from medusa_core.kernels.topk import argmax_rows
from medusa_core.model.int8_linear import to_int8
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


def assert_sums_near(actual, expected, dtype):
    """By relative norm: behind a norm, inputs and weights are rounded differently than the modules round them, so a single sum that
    cancels may be off by more than its own rounding; all of them together are not."""
    eps = torch.finfo(dtype).eps
    assert (actual.float() - expected).norm() <= 2 * eps * expected.norm()
    torch.testing.assert_close(actual.float(), expected, rtol=4 * eps, atol=8 * eps)


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
@pytest.mark.parametrize("num_rows", [1, 5, 33, 65])
@pytest.mark.parametrize("config", [None, LOOPED, replace(LOOPED, split_k=3)], ids=["default", "looped", "split"])
def test_norm_linear_equals_norm_then_linear(num_inputs, num_outputs, num_rows, config, dtype, counters):
    x = randn(num_rows, num_inputs, dtype=dtype)
    norm_weight, bias = randn(num_inputs, dtype=dtype, seed=1), randn(num_outputs, dtype=dtype, seed=2)
    weight = randn(num_outputs, num_inputs, dtype=dtype, seed=3, scale=num_inputs**-0.5)
    folded = linear.fold_norm(weight, norm_weight)
    actual = linear.norm_linear(x, EPS, folded, bias, counters=counters, config=config)
    assert_sums_near(actual, functional.linear(normed(x, norm_weight).float(), weight.float(), bias.float()), dtype)
    assert not counters.any()


def test_folding_the_norm_into_the_weight_rounds_less_than_the_modules(dtype):
    """Against the product in float64: the modules round the scaled value and its product with the norm's weight."""
    x, norm_weight = randn(200, 256, dtype=dtype), randn(256, dtype=dtype, seed=1)
    weight = randn(128, 256, dtype=dtype, seed=2, scale=256**-0.5)
    wide = x.double()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    exact = (scaled * norm_weight.double()) @ weight.double().t()
    modules = normed(x, norm_weight).double() @ weight.double().t()
    folded = scaled @ linear.fold_norm(weight, norm_weight).double().t()
    assert (folded - exact).norm() < (modules - exact).norm()


@pytest.mark.parametrize("num_rows", [1, 16, 17, 70])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
@pytest.mark.parametrize("config", [None, LOOPED], ids=["default", "looped"])
def test_gated_linear_equals_the_unfused_mlp(num_inputs, num_outputs, num_rows, config, dtype):
    x, norm_weight = randn(num_rows, num_inputs, dtype=dtype), randn(num_inputs, dtype=dtype, seed=1)
    gate, up = (randn(num_outputs, num_inputs, dtype=dtype, seed=seed, scale=num_inputs**-0.5) for seed in (2, 3))
    folded = linear.fold_norm(linear.interleave(gate, up), norm_weight)
    gate_sum, up_sum = (functional.linear(normed(x, norm_weight).float(), weight.float()) for weight in (gate, up))
    actual = linear.gated_linear(x, EPS, folded, config=config)
    assert_sums_near(actual, functional.silu(gate_sum) * up_sum, dtype)


@pytest.mark.parametrize("num_rows", [1, 5, 64, 65])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_residual_adds_the_product(num_inputs, num_outputs, num_rows, has_bias, dtype, counters):
    x, residual = randn(num_rows, num_inputs, dtype=dtype), randn(num_rows, num_outputs, dtype=dtype, seed=1)
    weight = randn(num_outputs, num_inputs, dtype=dtype, seed=2, scale=num_inputs**-0.5)
    bias = randn(num_outputs, dtype=dtype, seed=3) if has_bias else None
    before = residual.clone()
    actual = linear.linear_residual(x, weight, residual, bias, counters=counters)
    assert_near(actual, residual + exact_linear(x, weight, bias), dtype)
    assert torch.equal(residual, before)
    assert not counters.any()
    # whether or not it goes to the residual's memory
    other = linear.linear_residual(x, weight, residual, bias, counters=counters, may_overwrite=True)
    assert_near(other, actual, dtype)


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


# of a large output layer, for few rows and for more
LM_HEAD_CONFIGS = [SkinnyConfig(block_t=block_t, block_f=128, block_k=64, prefetch=False) for block_t in (16, 64)]


@pytest.mark.parametrize("num_rows", [1, 20, 70])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("config", [None, *LM_HEAD_CONFIGS], ids=["default", "16", "64"])
# the second is so large that many rows go through the library
@pytest.mark.parametrize("num_outputs", [150, 4200])
def test_the_best_output_is_the_argmax_of_the_projection(num_outputs, num_rows, config, has_bias, dtype):
    # whole numbers: sums are exact in any order, so that equal weights give equal outputs wherever in a tile they are
    x, weight = (3 * randn(num_rows, 48, dtype=dtype)).round(), (3 * randn(num_outputs, 48, dtype=dtype, seed=1)).round()
    # every output twice, so that each largest one is a tie
    half = num_outputs // 2
    weight[half:] = weight[:half]
    bias = randn(half, dtype=dtype, seed=2).repeat(2) if has_bias else None
    x[1:2] = torch.nan
    logits = linear.project(x, weight, bias, config=config)
    best = linear.best_output(x, weight, bias, config=config)
    assert best.tolist() == argmax_rows(logits).tolist()
    assert best.dtype == torch.int64
    assert (best < half).all()
    assert num_rows == 1 or len(best.unique()) > 5


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
    # silu's slope of up to 1.1 carries a sum that is rounded the other way to the result, which is rounded once more
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        linear.heads_block(x, weight, bias), expected, rtol=2 * eps, atol=2 * eps * float(expected.abs().max())
    )


@pytest.mark.parametrize("config", [None, replace(LOOPED, split_k=2)], ids=["default", "split"])
def test_a_rows_result_does_not_depend_on_its_company(config, dtype, counters):
    """Within 1 to 16 rows, and within 17 to 64: beyond 16 the default's blocks change, and with them the order of additions."""
    num_inputs = 1280
    x, weight = randn(64, num_inputs, dtype=dtype), randn(48, num_inputs, dtype=dtype, seed=1, scale=num_inputs**-0.5)
    residual = torch.zeros(64, 48, dtype=dtype, device=options.device)
    whole = linear.linear_residual(x, weight, residual, counters=counters, config=config)
    few = linear.linear_residual(x[:16], weight, residual[:16], counters=counters, config=config)
    assert_near(few, whole[:16], dtype)
    for num_rows, same in ((1, few), (9, few), (17, whole), (40, whole)):
        part = linear.linear_residual(x[:num_rows], weight, residual[:num_rows], counters=counters, config=config)
        assert torch.equal(part, same[:num_rows])


@pytest.mark.parametrize("config", [None, LOOPED], ids=["default", "looped"])
def test_a_normed_rows_result_does_not_depend_on_its_company(config, dtype):
    x, weight = randn(64, 80, dtype=dtype), randn(96, 80, dtype=dtype, seed=1, scale=80**-0.5)
    few, whole = (linear.gated_linear(x[:num_rows], EPS, weight, config=config) for num_rows in (16, 64))
    for num_rows, same in ((1, few), (9, few), (17, whole), (40, whole)):
        assert torch.equal(linear.gated_linear(x[:num_rows], EPS, weight, config=config), same[:num_rows])


def test_float32_goes_through_the_library():
    x, norm_weight = randn(3, 48, dtype=torch.float32), randn(48, dtype=torch.float32, seed=1)
    weight = randn(80, 48, dtype=torch.float32, seed=2)
    folded = linear.fold_norm(weight, norm_weight)
    assert_near(linear.norm_linear(x, EPS, folded), functional.linear(normed(x, norm_weight), weight), torch.float32)
    gate, up = functional.linear(normed(x, norm_weight), weight).view(3, 40, 2).unbind(-1)
    assert_near(linear.gated_linear(x, EPS, folded), functional.silu(gate) * up, torch.float32)


def test_a_split_product_without_counters_is_refused(dtype):
    x, weight = randn(1, 512, dtype=dtype), randn(16, 512, dtype=dtype)
    with pytest.raises(ValueError, match="counter"):
        skinny_product(x, weight, replace(LOOPED, split_k=2), out=torch.empty(1, 16, dtype=dtype, device=x.device))


def test_rows_that_are_not_contiguous_are_refused(dtype):
    x, weight = randn(4, 512, dtype=dtype), randn(16, 256, dtype=dtype)
    with pytest.raises(ValueError, match="contiguous"):
        linear.project(x[:, :256], weight)


def test_a_norm_beyond_what_the_config_holds_is_refused(dtype):
    x, weight = randn(1, 64, dtype=dtype), randn(16, 64, dtype=dtype)
    with pytest.raises(ValueError, match="norm"):
        skinny_product(x, weight, replace(LOOPED, block_t=32), out=torch.empty_like(x[:, :16]).contiguous(), norm_eps=EPS)


@pytest.mark.parametrize("can_split", [False, True])
def test_every_default_config_is_one_the_kernel_takes(can_split):
    for num_inputs, num_outputs in ((48, 40), (896, 1152), (4864, 896), (4096, 6144), (14336, 4096), (896, 151936), (896, 9728)):
        configs = [linear.choose_config(rows, num_outputs, num_inputs, can_split=can_split) for rows in (1, 16, 17, 64)]
        assert configs[0] == configs[1]
        assert configs[2] == configs[3]
        for config in configs:
            assert can_split or config.split_k == 1
            for block in (config.block_t, config.block_f, config.block_k):
                assert block >= 16
                assert block & (block - 1) == 0
            # the smallest there are: a consumer GPU's, and that of a GPU without bfloat16
            for shared_bytes in (99 * 1024, 64 * 1024):
                assert linear.fit_config(config, shared_bytes).shared_bytes <= shared_bytes


def test_a_config_is_cut_down_to_the_shared_memory_there_is():
    large = SkinnyConfig(block_t=64, block_f=128, block_k=128, num_stages=4)
    assert linear.fit_config(large, large.shared_bytes) == large
    small = linear.fit_config(large, 99 * 1024)
    assert small.shared_bytes <= 99 * 1024
    assert (small.block_t, small.block_k, small.num_stages) == (64, 128, 2)
    kept = linear.fit_config(large, 64 * 1024, keeps_outputs=True)
    assert kept.shared_bytes <= 64 * 1024
    assert kept.block_f == large.block_f


def int8_weight(num_outputs, num_inputs, dtype):
    """(int8, scale), and the same weight in float32."""
    rounded, scale = to_int8(randn(num_outputs, num_inputs, dtype=dtype, seed=3, scale=num_inputs**-0.5))
    return rounded, scale, rounded.float() * scale[:, None]


def test_more_rows_than_weights_of_8_bits_take_are_refused(dtype):
    weight, scale, _ = int8_weight(48, 2112, dtype)
    x = randn(linear.MAX_SKINNY_ROWS + 1, 2112, dtype=dtype)
    with pytest.raises(ValueError, match="up to 64 rows"):
        linear.gated_product(x, weight, scale_2I=scale)
    with pytest.raises(ValueError, match="up to 64 rows"):
        linear.linear_residual(x, weight, x[:, :48].contiguous(), scale_E=scale)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 64])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
@pytest.mark.parametrize("config", [None, LOOPED], ids=["default", "looped"])
def test_products_with_weights_of_8_bits(num_inputs, num_outputs, num_rows, config, dtype, counters):
    x, residual = randn(num_rows, num_inputs, dtype=dtype), randn(num_rows, num_outputs, dtype=dtype, seed=1)
    weight, scale, wide = int8_weight(num_outputs, num_inputs, dtype)
    bias = randn(num_outputs, dtype=dtype, seed=2)
    expected = functional.linear(x.float(), wide, bias.float())
    added = linear.linear_residual(x, weight, residual, bias, scale_E=scale, counters=counters, config=config)
    assert_near(added, (residual.float() + expected).to(dtype), dtype)
    assert not counters.any()
    gate, up = expected.unflatten(1, (-1, 2)).unbind(-1)
    gated = linear.gated_product(x, weight, bias, scale_2I=scale, config=config)
    assert_near(gated, (functional.silu(gate) * up).to(dtype), dtype)
