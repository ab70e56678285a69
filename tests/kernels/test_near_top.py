"""The candidates that tiles of a product keep, against the product itself."""

import pytest
import torch

from medusa_core.kernels.near_top import TILE_KEYS, TILE_LEN, near_top_keys, num_keys, spread_order
from medusa_core.kernels.topk import candidates_of_keys
from medusa_core.model.int8_linear import to_int8
from tests import options


@pytest.mark.parametrize("num_outputs", [5, 128, 1000, 8192])
def test_the_order_names_every_output_once_and_parts_neighbours(num_outputs):
    order = spread_order(num_outputs)
    assert torch.equal(order.sort().values, torch.arange(num_outputs))
    num_tiles = num_keys(num_outputs) // TILE_KEYS
    place = torch.empty_like(order)
    place[order] = torch.arange(num_outputs)
    if num_outputs % TILE_LEN == 0 and num_tiles > 1:
        # any so many in a row are in so many tiles
        assert all(len(set(tiles.tolist())) == num_tiles for tiles in (place // TILE_LEN).unfold(0, num_tiles, 1))


@pytest.mark.parametrize("num_rows", [1, 16, 17, 50])
@pytest.mark.parametrize("num_outputs", [300, 1024])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_tile_keeps_its_best(num_rows, num_outputs, is_int8, has_bias):
    generator = torch.Generator().manual_seed(num_rows)
    # whole numbers of few values: exact in any order, and many are equal
    x = torch.randint(-3, 4, (num_rows, 48), generator=generator).to(options.device, torch.float16)
    weight = torch.randint(-3, 4, (num_outputs, 48), generator=generator).to(options.device, torch.float16)
    bias = torch.randint(-9, 9, (num_outputs,), generator=generator).to(options.device, torch.float16) if has_bias else None
    scale = None
    logits = x.float() @ weight.float().t() + (0 if bias is None else bias.float())
    if is_int8:
        weight, scale = weight.to(torch.int8), torch.ones(num_outputs, device=options.device)
    keys = torch.zeros(num_rows, num_keys(num_outputs), dtype=torch.int64, device=options.device)
    near_top_keys(x, weight, scale_V=scale, bias_V=bias, out_RJ=keys)
    for begin in range(0, num_outputs, TILE_LEN):
        tile = keys[:, begin // TILE_LEN * TILE_KEYS :][:, :TILE_KEYS]
        expected = logits[:, begin : begin + TILE_LEN].sort(dim=1, descending=True, stable=True).indices + begin
        assert torch.equal(candidates_of_keys(tile.contiguous(), TILE_KEYS), expected[:, :TILE_KEYS])


def test_keys_of_another_shape_are_refused():
    x, weight = torch.zeros(2, 48, dtype=torch.float16), torch.zeros(300, 48, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"instead of \[2, 6\]"):
        near_top_keys(x, weight, out_RJ=torch.zeros(2, 3, dtype=torch.int64))


def test_candidates_are_nearly_the_best():
    generator = torch.Generator().manual_seed(0)
    num_outputs, num_candidates = 8192, 10
    x = torch.randn(8, 32, generator=generator).to(options.device, torch.float16)
    wide = torch.randn(num_outputs, 32, generator=generator).to(options.device)
    weight, scale = to_int8(wide)
    token_map = torch.randperm(num_outputs, generator=generator).to(options.device)
    keys = torch.empty(8, num_keys(num_outputs), dtype=torch.int64, device=options.device)
    near_top_keys(x, weight, scale_V=scale, out_RJ=keys)
    found = candidates_of_keys(keys, num_candidates, token_map_V=token_map)
    best = token_map[(x.float() @ (weight.float() * scale[:, None]).t()).topk(num_candidates).indices]
    assert (found == best).float().mean() >= 0.9
