"""The step: what is in flight when, what is refused, what is counted."""

from __future__ import annotations

import pytest

from medusa_core.engine.core import EngineCore
from medusa_core.errors import EngineError, InvalidParameterError, PromptError, UnsupportedParameterError
from medusa_core.outputs import STEP_LATENCY_BOUNDS_S, FinishReason, TokenDelta
from medusa_core.params import Grammar, SamplingParams
from medusa_core.plan import StepPlan
from medusa_core.request import EngineRequest
from tests.engine.fake import INFO, VOCAB_SIZE, FakeRunner, FakeScheduler
from tests.grammars import no_compiler


def make_core(max_steps_in_flight: int = 0) -> tuple[EngineCore, FakeScheduler, FakeRunner]:
    runner = FakeRunner()
    scheduler = FakeScheduler(runner)
    core = EngineCore(scheduler, runner, INFO, max_steps_in_flight=max_steps_in_flight, grammars=no_compiler())
    return core, scheduler, runner


def make_request(prompt: list[int], request_id: str = "a", **params) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**params))


def run_to_end(core: EngineCore) -> list[TokenDelta]:
    deltas = []
    while core.has_work:
        deltas += core.step()
    return deltas


@pytest.mark.parametrize("max_steps_in_flight", [0, 1, 2])
def test_tokens_do_not_depend_on_the_steps_in_flight(max_steps_in_flight):
    core, _, _ = make_core(max_steps_in_flight)
    core.submit(make_request([5, 6, 7], max_tokens=4))
    deltas = run_to_end(core)
    assert [delta.token_ids for delta in deltas] == [[5], [6], [7], [5]]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("max_steps_in_flight", [0, 1])
def test_a_result_comes_at_most_max_steps_in_flight_steps_late(max_steps_in_flight):
    core, _, runner = make_core(max_steps_in_flight)
    core.submit(make_request([5, 6], max_tokens=10))
    for _ in range(max_steps_in_flight):
        assert core.step() == []
    assert core.step()[0].token_ids == [5]
    assert len(runner.plans) == max_steps_in_flight + 1


@pytest.mark.parametrize("max_steps_in_flight", [0, 1])
def test_abort_frees_blocks_within_the_steps_in_flight_plus_one(max_steps_in_flight):
    core, _, _ = make_core(max_steps_in_flight)
    core.submit(make_request([5], max_tokens=1000))
    for _ in range(5):
        core.step()
    assert core.stats().num_blocks_used == 1
    (last,) = core.abort("a")
    assert last.finish_reason is FinishReason.ABORT
    num_steps = 0
    while core.has_work:
        assert core.step() == []
        num_steps += 1
    assert core.stats().num_blocks_used == 0
    assert num_steps <= max_steps_in_flight + 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([], "empty"), ([1, 2, VOCAB_SIZE], f"token 2 is {VOCAB_SIZE}"), ([1, -1], "token 1 is -1")],
)
def test_a_prompt_outside_the_vocabulary_is_refused_with_index_and_value(prompt, expected):
    core, _, _ = make_core()
    with pytest.raises(PromptError, match=expected) as caught:
        core.submit(make_request(prompt))
    assert caught.value.param == "prompt"
    assert not core.has_work


def test_the_first_and_the_last_id_of_the_vocabulary_are_accepted():
    core, _, _ = make_core()
    core.submit(make_request([0, VOCAB_SIZE - 1], max_tokens=2, stop_token_ids=(0, VOCAB_SIZE - 1)))
    assert [delta.token_ids for delta in run_to_end(core)] == [[0], [VOCAB_SIZE - 1]]


def test_a_stop_token_id_outside_the_vocabulary_is_refused():
    core, _, _ = make_core()
    with pytest.raises(InvalidParameterError, match="1000") as caught:
        core.submit(make_request([1], stop_token_ids=(3, VOCAB_SIZE)))
    assert caught.value.param == "stop_token_ids"


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_bias_outside_the_vocabulary_is_refused(token_id):
    core, _, _ = make_core()
    with pytest.raises(InvalidParameterError, match=f"logit_bias holds {token_id}") as caught:
        core.submit(make_request([1], logit_bias=((3, 1.0), (token_id, 1.0))))
    assert caught.value.param == "logit_bias"


def test_a_bias_that_is_named_twice_is_refused():
    with pytest.raises(InvalidParameterError, match="more than once"):
        make_request([1], logit_bias=((3, 1.0), (3, 2.0)))


def test_a_stop_list_that_would_slow_everybody_is_refused():
    core, _, _ = make_core()
    with pytest.raises(InvalidParameterError, match="129 ids, at most 128") as caught:
        core.submit(make_request([1], stop_token_ids=(1,) * 129))
    assert caught.value.param == "stop_token_ids"


def test_steps_and_their_time_are_counted():
    core, _, _ = make_core()
    core.submit(make_request([5], max_tokens=3))
    run_to_end(core)
    stats = core.stats()
    assert stats.num_steps_total == 3
    assert stats.step_seconds_total > 0
    assert sum(stats.num_steps_by_latency_total) == 3
    assert stats.num_blocks == 100


@pytest.mark.parametrize("max_steps_in_flight", [0, 1])
def test_steps_are_timed_from_result_to_result(max_steps_in_flight, monkeypatch):
    """With a step in flight, what the host does meanwhile is part of it. Time before a launch is not."""
    now = [0.0]
    monkeypatch.setattr("medusa_core.engine.core.time.perf_counter", lambda: now[0])
    core, _, _ = make_core(max_steps_in_flight)
    for _ in range(2):
        core.submit(make_request([5], max_tokens=4))
        while core.has_work:
            core.step()
            now[0] += 0.25
        now[0] += 100
    stats = core.stats()
    counts = dict(zip(STEP_LATENCY_BOUNDS_S, stats.num_steps_by_latency_total, strict=False))
    # the clock stands still within a call, and a step's result comes `max_steps_in_flight` calls after its launch
    assert stats.num_steps_total == 8
    assert stats.step_seconds_total == 8 * 0.25 * max_steps_in_flight
    assert counts[0.3 if max_steps_in_flight else 0.0005] == 8


def test_a_scheduler_that_plans_nothing_for_its_requests_is_an_error_not_a_busy_loop():
    core, scheduler, _ = make_core()
    scheduler.schedule = lambda: StepPlan(step_id=1)
    core.submit(make_request([5], max_tokens=3))
    with pytest.raises(EngineError, match="plans no step"):
        core.step()


def test_a_tree_size_is_passed_on_and_auto_gives_the_choice_back():
    core, scheduler, runner = make_core()
    forced = []
    scheduler.force_tree_size = forced.append
    for size in (1, 16, "auto"):
        core.set_tree_size(size)
    assert forced == [1, 16, None]
    assert core.runner is runner


def test_a_grammar_that_cannot_be_compiled_is_refused_before_the_scheduler_sees_it():
    core, scheduler, _ = make_core()
    with pytest.raises(UnsupportedParameterError, match="regex is not supported") as caught:
        core.submit(make_request([1], grammar=Grammar(kind="regex", text="a", field="structured_outputs.regex")))
    assert caught.value.param == "structured_outputs.regex"
    assert not scheduler.open
