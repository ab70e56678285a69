"""Argmax and top-k of long rows against torch's stable sort."""

import pytest
import torch

pytest.importorskip("triton")

from medusa_core.kernels import topk
from medusa_core.kernels.topk import argmax_rows, topk_rows, topk_rows_with_values
from tests import options

INF = float("inf")


def logits(num_rows: int, num_columns: int, seed: int = 0, num_levels: int | None = None) -> torch.Tensor:
    """Random rows; with `num_levels`, of so few distinct values that most entries are ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, num_columns, generator=generator)
    if num_levels is not None:
        rows = torch.randint(-num_levels, num_levels, (num_rows, num_columns), generator=generator).float()
    return rows.to(options.device)


def stable_topk(logits_RV: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, columns), the lowest column first among equals."""
    values, ids = logits_RV.sort(dim=1, descending=True, stable=True)
    return values[:, :num_candidates], ids[:, :num_candidates]


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_candidates"),
    [(1, 1, 1), (3, 7, 7), (4, 1000, 10), (2, 1024, 1), (5, 1025, 64), (1, 5000, 33), (3, 9001, 10), (1, 151_936, 10)],
)
def test_topk_is_that_of_a_stable_sort(num_rows, num_columns, num_candidates):
    rows = logits(num_rows, num_columns)
    values, ids = stable_topk(rows, num_candidates)
    found_ids, found_values = topk_rows_with_values(rows, num_candidates)
    assert found_values.tolist() == values.tolist() == rows.topk(num_candidates, dim=1).values.tolist()
    assert found_ids.tolist() == ids.tolist()
    assert found_ids.dtype == torch.int64


@pytest.mark.parametrize("num_levels", [1, 2, 20])
@pytest.mark.parametrize("num_candidates", [1, 10])
def test_among_equals_the_lowest_column_comes_first(num_levels, num_candidates):
    rows = logits(3, 3000, seed=num_levels, num_levels=num_levels)
    assert topk_rows(rows, num_candidates).tolist() == stable_topk(rows, num_candidates)[1].tolist()
    assert argmax_rows(rows).tolist() == stable_topk(rows, 1)[1].flatten().tolist()


def test_signed_zeros_are_equal():
    rows = torch.tensor([[-1.0, -0.0, 0.0, -2.0]], device=options.device)
    assert topk_rows(rows, 4).tolist() == [[1, 2, 0, 3]]
    assert argmax_rows(rows).tolist() == [1]


def test_banned_columns_come_last():
    rows = logits(2, 2100)
    rows[0] = -INF
    rows[1, 5:] = -INF
    ids, values = topk_rows_with_values(rows, 8)
    assert ids[0].tolist() == list(range(8))
    assert ids[1].tolist() == [*rows[1].argsort(descending=True, stable=True)[:5].tolist(), 5, 6, 7]
    assert values[1, 5:].tolist() == [-INF] * 3
    assert argmax_rows(rows).tolist() == [0, int(rows[1].argmax())]


def test_rows_with_nan_or_infinities_give_columns():
    rows = logits(4, 2100)
    rows[0] = torch.nan
    rows[1, ::2] = torch.nan
    rows[2, 77] = INF
    rows[3, 2000:] = -INF
    assert argmax_rows(rows).tolist() == [0, int(rows[1].nan_to_num(-INF).argmax()), 77, int(rows[3].argmax())]
    assert topk_rows(rows, 3)[:3, 0].tolist() == argmax_rows(rows)[:3].tolist()


def test_topk_through_a_draft_vocabulary():
    rows = logits(3, 1500)
    token_map = torch.randperm(9000, generator=torch.Generator().manual_seed(1))[:1500].to(options.device)
    assert topk_rows(rows, 6, token_map_V=token_map).tolist() == token_map[topk_rows(rows, 6)].tolist()


def test_rows_of_a_wider_tensor():
    """A padded vocabulary: rows are apart by more than their length, and what lies between is not read."""
    wide = logits(5, 1400)
    wide[:, 1300:] = INF
    rows = wide[:, :1300]
    assert argmax_rows(rows).tolist() == rows.argmax(dim=1).tolist()
    assert topk_rows(rows, 5).tolist() == stable_topk(rows, 5)[1].tolist()


@pytest.mark.parametrize("num_rows", [1, 3, 50, 140])
@pytest.mark.parametrize("num_columns", [1, 600, 4099])
def test_argmax_of_few_and_many_rows(num_rows, num_columns):
    rows = logits(num_rows, num_columns, seed=num_rows)
    assert argmax_rows(rows).tolist() == rows.argmax(dim=1).tolist()


def test_topk_does_not_depend_on_the_split(monkeypatch):
    rows = logits(2, 9000, num_levels=50)
    expected = topk_rows(rows, 12).tolist()
    monkeypatch.setattr(topk, "_NUM_PROGRAMS_TO_FILL", 1)
    assert topk_rows(rows, 12).tolist() == expected


def test_no_rows():
    rows = torch.empty(0, 500, device=options.device)
    assert argmax_rows(rows).shape == (0,)
    assert topk_rows(rows, 4).shape == (0, 4)


@pytest.mark.parametrize("num_candidates", [0, 11])
def test_more_candidates_than_columns_are_refused(num_candidates):
    with pytest.raises(ValueError, match="not between 1 and the 10 columns"):
        topk_rows(logits(1, 10), num_candidates)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_candidates"), [(4, 32_768, 10), (4096, 32_768, 10), (300, 151_936, 64), (1, 151_936, 64)]
)
def test_topk_at_the_sizes_of_a_model(num_rows, num_columns, num_candidates):
    rows = torch.randn(num_rows, num_columns, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    assert torch.equal(topk_rows(rows, num_candidates), stable_topk(rows, num_candidates)[1])


@pytest.mark.cuda
@pytest.mark.parametrize("num_rows", [1, 7, 64, 128, 1024])
def test_argmax_at_the_sizes_of_a_model(num_rows):
    rows = torch.randn(num_rows, 151_936, device="cuda", generator=torch.Generator("cuda").manual_seed(3)).round(decimals=1)
    first = torch.where(rows == rows.amax(dim=1, keepdim=True), torch.arange(151_936, device="cuda"), 151_936).amin(dim=1)
    assert torch.equal(argmax_rows(rows), first)
