"""From records to figures. Everything printed by `medusa bench` about requests is computed here.

Definitions. Tokens per second: output tokens of answered requests over the whole run's seconds, prefill included. Acceptance
length: tokens emitted per step that offered a tree, bonus included; the first token belongs to no step. Inter-token latency per
frame: the time between deliveries of a request; per token: the same divided by the tokens of the later delivery, once per token.
Time per output token: (last - first delivery) / (tokens - those of the first delivery), per request.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from medusa_core.bench.records import RequestRecord, RunRecord

# Quantiles kept for the plot of a distribution.
_NUM_QUANTILES = 101


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A distribution in a few numbers, in the unit of its values (seconds)."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class CategoryFigures:
    """tokens_per_s: tokens over the summed times of the category's requests, each from sent to answered: the speed a user sees."""

    category: str
    num_requests: int
    num_output_tokens: int
    tokens_per_s: float
    acceptance_length: float | None


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """All repetitions of one variant at one load, pooled; `tokens_per_s_range` is the slowest and the fastest of them.

    What no request could tell is None: drafts over HTTP, latencies where nothing was answered. itl_quantiles_s: 0 to 100 %,
    inter-token latency per frame. cost_per_million: of output tokens, in the currency of the price.
    """

    variant: str
    concurrency: int | None
    request_rate: float | None
    num_repetitions: int
    num_requests: int
    num_errors: int
    errors: dict[str, int]
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    tokens_per_s: float
    tokens_per_s_range: tuple[float, float]
    requests_per_s: float
    ttft_s: Spread | None
    itl_token_s: Spread | None
    itl_frame_s: Spread | None
    tpot_s: Spread | None
    output_tokens: Spread | None
    acceptance_length: float | None
    num_draft_steps: int
    num_plain_steps: int
    mean_nodes: float | None
    num_engine_steps: int | None
    num_frames: int
    cost_per_million: float | None
    categories: list[CategoryFigures]
    itl_quantiles_s: list[float]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Tokens per second of a variant over those of the baseline; the range is over repetitions, each with its neighbour in time."""

    variant: str
    baseline: str
    concurrency: int | None
    ratio: float
    ratio_range: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Prompts whose tokens differ from the reference run's. first_differences: index of the first different token, sorted."""

    variant: str
    concurrency: int | None
    reference: str
    reference_concurrency: int | None
    num_prompts: int
    num_tokens: int
    first_differences: list[int]

    @property
    def rate(self) -> float:
        return len(self.first_differences) / self.num_prompts if self.num_prompts else 0.0


def what_is_missing(*parts: tuple[str, int, int]) -> str | None:
    """From (what, done, of so many): "5 of 8 runs", without the parts that are done. None where all are."""
    return ", ".join(f"{done} of {total} {name}" for name, done, total in parts if done < total) or None


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values at position share * (n - 1). Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    return _quantile_of_sorted(sorted(values), share)


def _quantile_of_sorted(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    left = min(int(position), len(ordered) - 1)
    right = min(left + 1, len(ordered) - 1)
    return ordered[left] + (ordered[right] - ordered[left]) * (position - left)


def spread(values: Iterable[float]) -> Spread | None:
    """None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95, p99 = (_quantile_of_sorted(ordered, share) for share in (0.5, 0.95, 0.99))
    return Spread(count=len(ordered), mean=sum(ordered) / len(ordered), p50=p50, p95=p95, p99=p99, max=ordered[-1])


def cost_per_million(price_per_gpu_hour: float, tokens_per_s: float, num_gpus: int = 1) -> float | None:
    """Price of a million output tokens. None where there were none."""
    return price_per_gpu_hour * num_gpus / 3600 / tokens_per_s * 1e6 if tokens_per_s > 0 else None


def acceptance_length(records: Iterable[RequestRecord]) -> float | None:
    """None where no step offered a tree."""
    records = list(records)
    num_steps = sum(record.num_draft_steps for record in records)
    return sum(record.num_draft_step_tokens for record in records) / num_steps if num_steps else None


def frame_gaps_s(record: RequestRecord) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(record.frame_times_s)]


def token_gaps_s(record: RequestRecord) -> list[float]:
    """One value per token behind the first delivery; none where the tokens of each delivery are unknown."""
    gaps = zip(frame_gaps_s(record), record.frame_num_tokens[1:], strict=False)
    return [gap / num_tokens for gap, num_tokens in gaps for _ in range(num_tokens)]


def time_per_output_token_s(record: RequestRecord) -> float | None:
    """None for an answer in one delivery. Where the first delivery's tokens are unknown, they count as one."""
    num_first = record.frame_num_tokens[0] if record.frame_num_tokens else 1
    num_later = record.num_output_tokens - num_first
    if len(record.frame_times_s) < 2 or num_later < 1:
        return None
    return (record.frame_times_s[-1] - record.frame_times_s[0]) / num_later


def summarise(runs: Sequence[RunRecord], *, price_per_gpu_hour: float | None = None) -> RunFigures:
    """Figures of the repetitions of one variant at one load. Raises ValueError for none, or for runs of different kinds."""
    if len({(run.variant, run.concurrency, run.request_rate) for run in runs}) != 1:
        raise ValueError("runs of one variant at one load are needed")
    answered = [record for run in runs for record in run.answered]
    errors = Counter(record.error for run in runs for record in run.requests if record.error is not None)
    num_output_tokens = sum(record.num_output_tokens for record in answered)
    seconds = sum(run.seconds for run in runs)
    tokens_per_s = _rate(num_output_tokens, seconds)
    rates = [run_tokens_per_s(run) for run in runs]
    gaps_s = [gap for record in answered for gap in frame_gaps_s(record)]
    num_draft_steps = sum(record.num_draft_steps for record in answered)
    num_plain_steps = sum(record.num_plain_steps for record in answered)
    num_steps = num_draft_steps + num_plain_steps
    engine_steps = [run.num_engine_steps for run in runs]
    tpot_s = [seconds for seconds in map(time_per_output_token_s, answered) if seconds is not None]
    return RunFigures(
        variant=runs[0].variant,
        concurrency=runs[0].concurrency,
        request_rate=runs[0].request_rate,
        num_repetitions=len(runs),
        num_requests=sum(len(run.requests) for run in runs),
        num_errors=errors.total(),
        errors=dict(errors),
        num_prompt_tokens=sum(record.num_prompt_tokens for record in answered),
        num_output_tokens=num_output_tokens,
        seconds=seconds,
        tokens_per_s=tokens_per_s,
        tokens_per_s_range=(min(rates), max(rates)),
        requests_per_s=_rate(len(answered), seconds),
        ttft_s=spread(record.frame_times_s[0] - record.start_s for record in answered if record.frame_times_s),
        itl_token_s=spread(gap for record in answered for gap in token_gaps_s(record)),
        itl_frame_s=spread(gaps_s),
        tpot_s=spread(tpot_s),
        output_tokens=spread(record.num_output_tokens for record in answered),
        acceptance_length=acceptance_length(answered),
        num_draft_steps=num_draft_steps,
        num_plain_steps=num_plain_steps,
        mean_nodes=sum(record.num_nodes for record in answered) / num_steps if num_steps else None,
        num_engine_steps=None if None in engine_steps else sum(steps for steps in engine_steps if steps is not None),
        num_frames=sum(record.num_frames for record in answered),
        cost_per_million=None if price_per_gpu_hour is None else cost_per_million(price_per_gpu_hour, tokens_per_s),
        categories=by_category(answered),
        itl_quantiles_s=_quantiles(gaps_s),
    )


def by_category(records: Iterable[RequestRecord]) -> list[CategoryFigures]:
    """In the order in which the categories' prompts come."""
    groups: dict[str, list[RequestRecord]] = {}
    for record in sorted(records, key=lambda record: record.prompt_idx):
        groups.setdefault(record.category, []).append(record)
    return [
        CategoryFigures(
            category=category,
            num_requests=len(group),
            num_output_tokens=sum(record.num_output_tokens for record in group),
            tokens_per_s=_rate(
                sum(record.num_output_tokens for record in group), sum(record.end_s - record.start_s for record in group)
            ),
            acceptance_length=acceptance_length(group),
        )
        for category, group in groups.items()
    ]


def run_tokens_per_s(run: RunRecord) -> float:
    return _rate(sum(record.num_output_tokens for record in run.answered), run.seconds)


def compare_speed(variant: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> Ratio:
    """Pooled ratio, and its range over the repetitions that both have. Raises ValueError where the baseline emitted nothing."""
    baselines = {run.repetition: run_tokens_per_s(run) for run in baseline}
    pairs = [(run_tokens_per_s(run), baselines[run.repetition]) for run in variant if baselines.get(run.repetition)]
    pooled = _pooled_tokens_per_s(baseline)
    if not pairs or not pooled:
        raise ValueError("the baseline emitted nothing")
    ratios = [fast / slow for fast, slow in pairs]
    return Ratio(
        variant=variant[0].variant,
        baseline=baseline[0].variant,
        concurrency=variant[0].concurrency,
        ratio=_pooled_tokens_per_s(variant) / pooled,
        ratio_range=(min(ratios), max(ratios)),
    )


def compare_tokens(run: RunRecord, reference: RunRecord, *, max_tokens: int | None = None) -> Mismatch:
    """Compare the tokens of the prompts that both answered, the first `max_tokens` of each if given."""
    expected = {record.prompt_idx: record.token_ids[:max_tokens] for record in reference.answered}
    pairs = [
        (record.token_ids[:max_tokens], expected[record.prompt_idx]) for record in run.answered if record.prompt_idx in expected
    ]
    differences = (first_difference(actual, wanted) for actual, wanted in pairs)
    return Mismatch(
        variant=run.variant,
        concurrency=run.concurrency,
        reference=reference.variant,
        reference_concurrency=reference.concurrency,
        num_prompts=len(pairs),
        num_tokens=sum(len(wanted) for _, wanted in pairs),
        first_differences=sorted(index for index in differences if index is not None),
    )


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None. A missing token differs from any."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _pooled_tokens_per_s(runs: Sequence[RunRecord]) -> float:
    num_tokens = sum(record.num_output_tokens for run in runs for record in run.answered)
    return _rate(num_tokens, sum(run.seconds for run in runs))


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _quantiles(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [_quantile_of_sorted(ordered, number / (_NUM_QUANTILES - 1)) for number in range(_NUM_QUANTILES)] if ordered else []
