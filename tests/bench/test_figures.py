"""Arithmetic on records written by hand."""

from __future__ import annotations

import pytest

from medusa_core.bench.figures import (
    acceptance_length,
    compare_speed,
    compare_tokens,
    cost_per_million,
    first_difference,
    quantile,
    spread,
    summarise,
    time_per_output_token_s,
    token_gaps_s,
    what_is_missing,
)
from medusa_core.bench.records import RequestRecord, RunRecord


def record(prompt_idx: int = 0, **fields) -> RequestRecord:
    """A first token at 1.0 s, a plain step of 1 token, draft steps of 3 and 1; sent at 0.5 s."""
    defaults = {
        "category": "math",
        "start_s": 0.5,
        "end_s": 2.5,
        "num_prompt_tokens": 10,
        "num_output_tokens": 6,
        "frame_times_s": [1.0, 1.5, 2.1, 2.5],
        "frame_num_tokens": [1, 1, 3, 1],
        "num_frames": 4,
        "num_draft_steps": 2,
        "num_draft_step_tokens": 4,
        "num_plain_steps": 1,
        "num_nodes": 1 + 16 + 16,
    }
    return RequestRecord(prompt_idx=prompt_idx, **{**defaults, **fields})


def run(*records: RequestRecord, variant: str = "plain", concurrency: int = 1, repetition: int = 0, steps: int = 4) -> RunRecord:
    return RunRecord(
        variant=variant, concurrency=concurrency, repetition=repetition, requests=list(records), num_engine_steps=steps
    )


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.5), (0.95, 3.85), (1.0, 4.0), (1 / 3, 2.0)])
def test_quantiles_interpolate_between_sorted_values(share, expected):
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(expected)


def test_a_single_value_is_every_quantile_and_none_has_none():
    assert spread([7.0]) == spread(iter([7.0]))
    assert (spread([7.0]).p50, spread([7.0]).p99, spread([7.0]).max, spread([7.0]).count) == (7.0, 7.0, 7.0, 1)
    assert spread([]) is None
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_figures_of_one_run():
    other = record(1, category="qa", start_s=0.0, end_s=4.0, num_output_tokens=2, frame_times_s=[3.0, 4.0], frame_num_tokens=[1, 1])
    figures = summarise([run(record(), other)])
    assert figures.seconds == 4.0
    assert figures.tokens_per_s == (6 + 2) / 4.0
    assert figures.requests_per_s == 2 / 4.0
    assert figures.ttft_s.max == 3.0
    assert figures.ttft_s.p50 == pytest.approx((0.5 + 3.0) / 2)
    assert (figures.num_requests, figures.num_errors, figures.num_output_tokens, figures.num_prompt_tokens) == (2, 0, 8, 20)
    assert figures.num_engine_steps == 4
    assert figures.itl_frame_s.count == 4


def test_latency_per_token_divides_a_delivery_and_counts_each_of_its_tokens():
    assert token_gaps_s(record()) == pytest.approx([0.5, 0.2, 0.2, 0.2, 0.4])
    assert time_per_output_token_s(record()) == pytest.approx((2.5 - 1.0) / 5)


def test_where_tokens_of_a_frame_are_unknown_only_the_request_tells():
    unknown = record(frame_num_tokens=[])
    assert token_gaps_s(unknown) == []
    assert time_per_output_token_s(unknown) == pytest.approx((2.5 - 1.0) / 5)
    assert summarise([run(unknown)]).itl_token_s is None


def test_an_answer_in_one_delivery_has_no_time_per_token():
    single = record(frame_times_s=[1.0], frame_num_tokens=[1], num_output_tokens=1)
    assert time_per_output_token_s(single) is None
    assert summarise([run(single)]).itl_frame_s is None
    assert summarise([run(single)]).itl_quantiles_s == []


def test_acceptance_length_is_over_tree_steps_only():
    assert acceptance_length([record(), record(num_draft_steps=3, num_draft_step_tokens=3)]) == 7 / 5
    assert acceptance_length([record(num_draft_steps=0, num_draft_step_tokens=0)]) is None
    figures = summarise([run(record())])
    assert (figures.acceptance_length, figures.mean_nodes) == (2.0, 11.0)


def test_repetitions_are_pooled_and_their_range_is_kept():
    fast, slow = record(end_s=1.5), record(end_s=3.5)
    figures = summarise([run(fast), run(slow, repetition=1)])
    assert figures.tokens_per_s == 12 / 4.0
    assert figures.tokens_per_s_range == (2.0, 6.0)
    assert (figures.num_repetitions, figures.num_engine_steps) == (2, 8)


def test_failed_requests_are_errors_and_nothing_else():
    failed = record(1, error="HTTP 503: full", num_output_tokens=100, frame_times_s=[0.5, 9.0], end_s=9.0)
    figures = summarise([run(record(), failed)])
    assert (figures.num_requests, figures.num_errors, figures.errors) == (2, 1, {"HTTP 503: full": 1})
    assert (figures.num_output_tokens, figures.ttft_s.count, figures.itl_frame_s.count) == (6, 1, 3)
    assert sum(category.num_requests for category in figures.categories) == 1


def test_runs_where_nothing_was_answered():
    figures = summarise([run(record(error="refused", frame_times_s=[]))])
    assert (figures.tokens_per_s, figures.ttft_s, figures.categories, figures.mean_nodes) == (0.0, None, [], None)


def test_categories_come_in_the_order_of_their_prompts():
    records = [record(2, category="qa"), record(0, category="writing", num_output_tokens=2), record(3, category="qa", end_s=4.5)]
    writing, qa = summarise([run(*records)]).categories
    assert (writing.category, writing.num_requests, writing.tokens_per_s) == ("writing", 1, 2 / 2.0)
    # 2 and 4 seconds of requests, which overlap in time
    assert (qa.category, qa.num_output_tokens, qa.tokens_per_s, qa.acceptance_length) == ("qa", 12, 12 / 6.0, 2.0)


def test_cost_of_a_million_tokens():
    # 3.6 an hour is a thousandth a second: 1,000 tokens/s make a million in 1,000 seconds
    assert cost_per_million(3.6, 1000.0) == pytest.approx(1.0)
    assert cost_per_million(3.6, 0.0) is None
    assert summarise([run(record())], price_per_gpu_hour=10.8).cost_per_million == pytest.approx(10.8 / 3600 / 3.0 * 1e6)
    assert summarise([run(record())]).cost_per_million is None


def test_ratios_pair_repetitions_and_pool_for_the_middle():
    plain = [run(record(end_s=2.5)), run(record(end_s=6.5), repetition=1)]
    tree = [run(record(end_s=1.5), variant="tree-4"), run(record(end_s=2.5), variant="tree-4", repetition=1)]
    ratio = compare_speed(tree, plain)
    assert ratio.ratio == pytest.approx((12 / 3) / (12 / 8))
    assert ratio.ratio_range == pytest.approx((2.0, 3.0))
    assert (ratio.variant, ratio.baseline) == ("tree-4", "plain")


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        compare_speed([run(record())], [run(record(num_output_tokens=0))])


def test_runs_of_different_kinds_are_not_pooled():
    with pytest.raises(ValueError, match="one variant"):
        summarise([run(record()), run(record(), concurrency=8)])


def test_mismatches_are_counted_by_prompt_with_their_first_position():
    reference = run(record(0, token_ids=[1, 2, 3]), record(1, token_ids=[4, 5]), record(2, token_ids=[6]), record(3, token_ids=[7]))
    other = run(
        record(0, token_ids=[1, 2, 9]),
        record(1, token_ids=[4, 5]),
        record(2, token_ids=[6, 6]),
        record(3, token_ids=[8], error="failed"),
        variant="speculation",
    )
    mismatch = compare_tokens(other, reference)
    assert (mismatch.num_prompts, mismatch.first_differences, mismatch.rate) == (3, [1, 2], 2 / 3)
    assert compare_tokens(other, reference, max_tokens=1).first_differences == []


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [([], [], None), ([1], [1], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([5, 6], [5], 1), ([], [1], 0)],
)
def test_first_difference(left, right, expected):
    assert first_difference(left, right) == expected


def test_what_is_missing_names_the_parts_that_are_not_done():
    assert what_is_missing(("runs", 5, 8)) == "5 of 8 runs"
    assert what_is_missing(("steps", 3, 3), ("kernels", 0, 2), ("arrivals", 0, 1)) == "0 of 2 kernels, 0 of 1 arrivals"
    assert what_is_missing(("steps", 3, 3), ("arrivals", 0, 0)) is None
