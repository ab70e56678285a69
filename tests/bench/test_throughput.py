"""An engine core driven without HTTP: what is recorded, what is compared."""

from __future__ import annotations

import pytest

from medusa_core.bench.offline import run_closed_loop
from medusa_core.bench.prompts import random_prompts
from medusa_core.bench.records import RequestRecord, RunRecord
from medusa_core.bench.throughput import (
    ThroughputPlan,
    parse_variants,
    run_throughput,
    summarise_throughput,
    tree_size,
)
from medusa_core.engine.core import EngineCore
from medusa_core.errors import ConfigError
from medusa_core.params import SamplingParams
from tests.equivalence.driver import make_engine
from tests.equivalence.models import oracle_heads, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


PROMPTS = random_prompts(5, 9, 96, seed=3)


@pytest.fixture(scope="module")
def core() -> EngineCore:
    """Heads that know the greedy answers, and are right more often than not."""
    loaded = tiny_model("llama")
    plain = run_closed_loop(make_engine(loaded, None), PROMPTS, GREEDY, variant="plain", concurrency=1)
    sequences = [prompt.token_ids + record.token_ids for prompt, record in zip(PROMPTS, plain.requests, strict=True)]
    return make_engine(loaded, oracle_heads(loaded, sequences), enable_prefix_cache=False)


def make_plan(*variants: str) -> ThroughputPlan:
    return ThroughputPlan(variants=variants, concurrency=(1,), repeats=1, params=GREEDY, seed=0)


@pytest.fixture
def prompts():
    return PROMPTS


def test_every_prompt_is_answered_once_with_at_most_so_many_at_once(core, prompts):
    core.set_tree_size("auto")
    run = run_closed_loop(core, prompts, GREEDY, variant="speculation", concurrency=2)
    assert [record.prompt_idx for record in run.requests] == [0, 1, 2, 3, 4]
    for record in run.requests:
        assert len(record.token_ids) == record.num_output_tokens == sum(record.frame_num_tokens) == 12
        assert record.frame_num_tokens[0] == 1
        assert record.start_s <= record.frame_times_s[0] <= record.frame_times_s[-1] == record.end_s
        assert record.num_draft_steps + record.num_plain_steps == len(record.frame_times_s) - 1
        assert record.num_plain_steps + record.num_draft_step_tokens == 11
    events = sorted([(r.start_s, 1) for r in run.requests] + [(r.end_s, -1) for r in run.requests])
    open_now = [sum(change for _, change in events[: n + 1]) for n in range(len(events))]
    assert max(open_now) == 2
    assert not core.has_work
    assert run.num_engine_steps > 0


def test_plain_offers_no_tree_and_speculation_takes_fewer_steps(core, prompts):
    plan = ThroughputPlan(variants=("plain", "tree-4"), concurrency=(1, 4), repeats=2, params=GREEDY, seed=0)
    runs = list(run_throughput(core, prompts, plan, progress=False))
    # each repetition begins with another variant
    assert [(run.variant, run.concurrency, run.repetition) for run in runs] == [
        ("plain", 1, 0), ("tree-4", 1, 0), ("plain", 4, 0), ("tree-4", 4, 0),
        ("tree-4", 1, 1), ("plain", 1, 1), ("tree-4", 4, 1), ("plain", 4, 1),
    ]  # fmt: skip
    figures = summarise_throughput(runs, price_per_gpu_hour=1.0)
    by_name = {(run.variant, run.concurrency): run for run in figures.runs}
    plain, tree = by_name["plain", 1], by_name["tree-4", 1]
    assert (plain.acceptance_length, plain.num_draft_steps, plain.mean_nodes) == (None, 0, 1.0)
    assert plain.num_plain_steps == 2 * 5 * 11
    assert tree.mean_nodes == 4.0
    assert tree.acceptance_length > 1.2
    assert tree.num_engine_steps < plain.num_engine_steps
    assert by_name["plain", 4].num_engine_steps < plain.num_engine_steps
    assert {(ratio.variant, ratio.concurrency) for ratio in figures.ratios} == {("tree-4", 1), ("tree-4", 4)}
    assert all(mismatch.first_differences == [] for mismatch in figures.mismatches)
    assert {(m.variant, m.concurrency) for m in figures.mismatches} == {("tree-4", 1), ("tree-4", 4), ("plain", 4)}


def test_sampled_outputs_are_the_same_tokens_in_every_variant(core, prompts):
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=10, ignore_eos=True)
    plan = ThroughputPlan(variants=("plain", "tree-4"), concurrency=(2,), repeats=1, params=params, seed=5)
    runs = list(run_throughput(core, prompts, plan, progress=False))
    (mismatch,) = summarise_throughput(runs, price_per_gpu_hour=None).mismatches
    assert (mismatch.num_prompts, mismatch.first_differences) == (5, [])
    assert len({tuple(record.token_ids) for record in runs[0].requests}) == 5


def test_sizes_of_the_tree(core):
    sizes = core.info.tree_sizes
    assert sizes[:2] == (1, 4)
    with pytest.raises(ConfigError):
        next(run_throughput(core, [], make_plan("tree-7"), progress=False))


def test_speculation_without_heads_is_refused():
    core = make_engine(tiny_model("llama"), None)
    with pytest.raises(ConfigError, match="--heads"):
        next(run_throughput(core, [], make_plan("speculation"), progress=False))


def test_variants():
    assert parse_variants("plain, tree-16,transformers") == ("plain", "tree-16", "transformers")
    assert [tree_size(name) for name in ("plain", "speculation", "tree-16")] == [1, "auto", 16]
    for text in ("fast", "tree-1", "tree-", "", "plain,,speculation", "plain,plain"):
        with pytest.raises(ConfigError, match="--variants"):
            parse_variants(text)


def test_transformers_is_compared_over_its_own_prompts_and_tokens():
    def run(variant: str, tokens: dict[int, list[int]]) -> RunRecord:
        records = [
            RequestRecord(prompt_idx=idx, category="", start_s=0.0, end_s=1.0, token_ids=ids, num_output_tokens=len(ids))
            for idx, ids in tokens.items()
        ]
        return RunRecord(variant=variant, concurrency=1, repetition=0, requests=records)

    long, longer = [1] * 64, [1] * 64 + [2]
    figures = summarise_throughput(
        [run("transformers", {1: long}), run("plain", {0: [5], 1: longer}), run("speculation", {0: [5], 1: [1] * 63 + [9]})],
        price_per_gpu_hour=None,
    )
    found = {(m.variant, m.reference): (m.num_prompts, m.first_differences) for m in figures.mismatches}
    assert found == {
        ("plain", "transformers"): (1, []),
        ("speculation", "transformers"): (1, [63]),
        ("speculation", "plain"): (2, [63]),
    }
    assert [ratio.variant for ratio in figures.ratios] == ["speculation"]
