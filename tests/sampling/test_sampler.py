"""Filters against a plain definition, and draws against enumerated probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from medusa_core.params import SamplingParams
from medusa_core.sampling.sampler import SamplingRows, draw, filter_threshold
from tests import options


def make_rows(params: list[SamplingParams], keys: list[int] | None = None, stop_ids: list[list[int]] | None = None) -> SamplingRows:
    return SamplingRows(
        temperature_R=on_device([p.temperature for p in params]),
        top_k_R=on_device([p.top_k for p in params]),
        top_p_R=on_device([p.top_p for p in params]),
        min_p_R=on_device([p.min_p for p in params]),
        min_tokens_R=on_device([p.min_tokens for p in params]),
        stop_ids_RW=on_device(stop_ids or [[-1]] * len(params)),
        key_R=on_device(keys or list(range(len(params)))),
        epsilon_R=on_device([p.typical_acceptance[0] if p.typical_acceptance else 0.0 for p in params]),
        delta_R=on_device([p.typical_acceptance[1] if p.typical_acceptance else 0.0 for p in params]),
        is_all_greedy=all(p.is_greedy for p in params),
        has_top_k=any(p.top_k for p in params),
        has_top_p=any(p.top_p < 1 for p in params),
        has_min_p=any(p.min_p for p in params),
        has_min_tokens=any(p.min_tokens for p in params),
        has_typical=any(p.is_typical for p in params),
    )


def on_device(values: list) -> torch.Tensor:
    return torch.tensor(values, device=options.device)


def plain_kept(logits: list[float], params: SamplingParams) -> set[int]:
    """Temperature, top-k, top-p, min-p by their definitions, one token at a time."""
    scaled = [x / params.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: params.top_k] if params.top_k else order
    total = sum(math.exp(scaled[i]) for i in kept)
    if params.top_p < 1:
        nucleus, mass = [], 0.0
        for i in kept:
            nucleus.append(i)
            mass += math.exp(scaled[i]) / total
            if mass >= params.top_p:
                break
        kept = nucleus
    best = scaled[order[0]]
    return {i for i in kept if not params.min_p or math.exp(scaled[i] - best) >= params.min_p}


filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 10, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(filters, min_size=1, max_size=4), st.integers(0, 2**31), st.sampled_from([5, 40, 700]))
def test_filters_keep_what_their_definitions_keep(params, seed, vocab_size):
    # distinct, well separated logits: at a tie or at a threshold hit exactly the definition itself is ambiguous in floats
    logits = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed)).float() * (9.173 / vocab_size)
    logits = logits.to(options.device)
    rows = make_rows(params)
    scaled = logits / rows.temperature_R.unsqueeze(1)
    threshold = filter_threshold(scaled, rows)
    for row, p in enumerate(params):
        kept = set(range(vocab_size)) if threshold is None else set((scaled[row] >= threshold[row]).nonzero().flatten().tolist())
        expected = plain_kept(logits.tolist(), p)
        # one token more or less where the running sum meets top_p within rounding
        assert len(kept ^ expected) <= (1 if p.top_p < 1 else 0)


def test_ties_at_the_edge_are_all_kept():
    rows = make_rows([SamplingParams(top_k=2)])
    logits = on_device([[1.0, 3.0, 1.0, 1.0, 0.0]])
    assert (logits >= filter_threshold(logits, rows)).tolist() == [[True, True, True, True, False]]


def test_a_wide_nucleus_takes_the_full_sort():
    """With a flat distribution over 5,000 tokens the nucleus is wider than the candidates looked at first."""
    logits = torch.linspace(0.0, 0.01, 5000, device=options.device).unsqueeze(0)
    rows = make_rows([SamplingParams(top_p=0.9)])
    num_kept = int((logits >= filter_threshold(logits, rows)).sum())
    assert num_kept == pytest.approx(4500, abs=30)


def test_greedy_rows_take_the_argmax_in_any_company():
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(options.device)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.5, top_p=0.9), SamplingParams(temperature=0.0, top_k=5)]
    drawn = draw(logits, make_rows(params), on_device([4, 4, 4]))
    assert drawn[0] == logits[0].argmax()
    assert drawn[2] == logits[2].argmax()


@settings(deadline=None, max_examples=60)
@given(st.lists(filters, min_size=2, max_size=5), st.integers(0, 2**31))
def test_a_draw_does_not_depend_on_its_batch(params, seed):
    logits = torch.randn(len(params), 300, generator=torch.Generator().manual_seed(seed)).to(options.device)
    rows = make_rows(params, keys=[seed + i for i in range(len(params))])
    index = torch.arange(len(params), device=options.device)
    together = draw(logits, rows, index)
    for row in range(len(params)):
        one = on_device([row])
        assert draw(logits[one], rows.take(one), index[one]) == together[row]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.3, top_k=4),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=0.8, min_p=0.1, top_p=0.95, top_k=6),
    ],
)
def test_frequencies_match_the_filtered_softmax(params):
    """20,000 draws with distinct keys; a correct sampler fails this with probability 1e-4 per case, and the draws are fixed."""
    logits = on_device([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    kept = plain_kept(logits.tolist(), params)
    weights = torch.tensor([math.exp(logits[i] / params.temperature) if i in kept else 0.0 for i in range(8)])
    num_draws = 20_000
    rows = make_rows([params] * num_draws, keys=list(range(num_draws)))
    drawn = draw(logits.expand(num_draws, -1), rows, torch.full((num_draws,), 7, device=options.device))
    counts = torch.bincount(drawn, minlength=8).cpu()
    assert set(counts.nonzero().flatten().tolist()) <= kept
    expected = weights.double() / weights.double().sum() * num_draws
    # the chi-square statistic needs some expected count in each cell: rare tokens share one
    common = [i for i in sorted(kept) if expected[i] >= 10]
    observed = [*counts[common].tolist(), num_draws - int(counts[common].sum())]
    wanted = [*expected[common].tolist(), num_draws - float(expected[common].sum())]
    cells = len(observed) if wanted[-1] > 1e-6 else len(observed) - 1
    assert chisquare(observed[:cells], wanted[:cells]).pvalue > 1e-4


def test_stop_ids_are_banned_until_min_tokens():
    logits = on_device([[0.0, 5.0, 4.0, 3.0]]).repeat(3, 1)
    params = [SamplingParams(temperature=0.0, min_tokens=2)] * 3
    rows = make_rows(params, stop_ids=[[1, 2], [1, 2], [1, 2]])
    assert draw(logits, rows, on_device([0, 1, 2])).tolist() == [3, 3, 1]
    assert logits[0, 1] == 5.0, "the caller's logits are not modified"


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    """Logits over a temperature near 0 would overflow, and the first of several infinities would win."""
    logits = on_device([[1.0, 40.0, 39.0, -2.0]])
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=3, min_p=0.1)
    assert draw(logits, make_rows([params]), on_device([0])).tolist() == [1]
