"""Plans that the profiler submits, and the arithmetic of its clock, on a runner that only takes notes."""

from __future__ import annotations

import itertools

import pytest

from medusa_core.errors import ConfigError
from medusa_core.params import SamplingParams
from medusa_core.plan import StepPlan, StepResult
from medusa_core.runtime.step_profiler import StepProfiler
from tests.equivalence.driver import make_engine
from tests.equivalence.models import oracle_heads, tiny_model

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class NotingRunner:
    """events: plans submitted and results read, in order."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.num_open = 0
        self.max_open = 0

    def submit(self, plan: StepPlan) -> NotingRunner:
        self.plans.append(plan)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        return self

    def result(self) -> StepResult:
        self.num_open -= 1
        return StepResult(step_id=0, lanes=[])


def make_profiler(runner, **options) -> StepProfiler:
    defaults = {
        "num_lanes": 4, "num_blocks": 100, "block_size": 8, "max_model_len": 200, "vocab_size": 50, "max_depth": 2,
        "max_step_rows": 32, "max_step_tokens": 16,
    }  # fmt: skip
    return StepProfiler(runner, **{**defaults, **options})


def test_lanes_are_prefilled_in_chunks_decoded_and_left():
    runner = NotingRunner()
    make_profiler(runner).step_seconds(2, 4, 40, GREEDY, num_steps=6)
    joins = [join for plan in runner.plans for join in plan.joins]
    assert [(join.lane, len(join.token_ids), join.num_prompt_tokens) for join in joins] == [(0, 40, 40), (1, 40, 40)]
    blocks = [block for join in joins for block in join.block_ids]
    assert len(set(blocks)) == len(blocks)
    chunks = [chunk for plan in runner.plans for chunk in plan.chunks]
    assert [(c.lane, c.start, c.num_tokens, c.is_last) for c in chunks] == [
        (lane, start, size, start == 32) for lane in (0, 1) for start, size in ((0, 16), (16, 16), (32, 8))
    ]
    assert max(sum(chunk.num_tokens for chunk in plan.chunks) for plan in runner.plans) <= 16
    decoding = [plan for plan in runner.plans if plan.decode_groups]
    assert all((g.lanes, g.num_nodes) == ([0, 1], 4) for plan in decoding for g in plan.decode_groups)
    assert runner.plans[-1].leaves == [0, 1]
    # enough blocks for what all steps can emit, and the last tree
    num_slots = 8 * len(joins[0].block_ids)
    assert num_slots >= 40 + 1 + len(decoding) * 3 + 4


def test_the_next_step_is_on_its_way_before_a_result_is_read_and_none_is_left():
    runner = NotingRunner()
    make_profiler(runner).step_seconds(1, 1, 4, GREEDY, num_steps=5)
    assert (runner.max_open, runner.num_open) == (2, 0)


def test_the_median_of_the_times_between_results():
    ticks = itertools.accumulate([0.0, *([1.0] * 5), 0.0, 1.0, 9.0, 2.0, 3.0, 4.0])
    profiler = make_profiler(NotingRunner(), clock=lambda: next(ticks))
    assert profiler.step_seconds(1, 1, 4, GREEDY, num_steps=5) == 3.0


def test_lanes_are_left_even_where_a_step_fails():
    class Failing(NotingRunner):
        def submit(self, plan):
            if plan.decode_groups:
                raise RuntimeError("no")
            return super().submit(plan)

    runner = Failing()
    with pytest.raises(RuntimeError, match="no"):
        make_profiler(runner).step_seconds(2, 1, 4, GREEDY)
    assert runner.plans[-1].leaves == [0, 1]


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((5, 1, 10), "lanes"),
        ((4, 16, 10), "max_step_rows"),
        ((1, 1, 200), "max_model_len"),
        ((4, 8, 100), "blocks"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(size, reason):
    runner = NotingRunner()
    profiler = make_profiler(runner, num_blocks=60)
    assert reason in profiler.why_not(*size, num_steps=10)
    with pytest.raises(ConfigError, match=reason):
        profiler.step_seconds(*size, GREEDY, num_steps=10)
    assert runner.plans == []


def test_drafting_is_timed_by_whoever_can():
    assert make_profiler(NotingRunner()).draft_seconds(1, 4) is None
    profiler = make_profiler(NotingRunner(), draft_timer=lambda lanes, nodes: lanes + nodes / 10)
    assert profiler.draft_seconds(2, 4) == 2.4
    assert profiler.draft_seconds(2, 1) is None


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.7, top_p=0.9, ignore_eos=True)])
def test_on_the_real_runner(params):
    loaded = tiny_model("llama")
    core = make_engine(loaded, oracle_heads(loaded, [[1, 2, 3]]), enable_prefix_cache=False)
    profiler = make_profiler(core.runner, vocab_size=core.info.vocab_size, max_model_len=core.info.max_model_len, max_depth=4)
    for num_nodes in (1, 4):
        assert profiler.step_seconds(3, num_nodes, 20, params, num_steps=3) > 0
    assert not core.has_work
