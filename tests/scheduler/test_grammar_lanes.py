"""When lanes with a grammar take part in a step. See test_scheduler.py for what a harness has unless a test says otherwise."""

import itertools

import pytest

from medusa_core.outputs import FinishReason
from medusa_core.params import Grammar
from medusa_core.plan import DecodeGroup, LaneResult
from medusa_core.scheduler.scheduler import _PAUSE_S
from tests.scheduler.harness import Harness

GRAMMAR = Grammar(kind="regex", text="a*")


def test_lanes_with_a_grammar_wait_for_their_results_and_others_do_not():
    harness = Harness(max_steps_in_flight=1, tree_size=4)
    harness.add([1, 2], max_tokens=20, grammar=GRAMMAR)
    harness.add([3, 4], max_tokens=20)
    harness.add([5, 6], max_tokens=20, grammar=GRAMMAR)
    # lanes and whether they have a grammar, step by step: the prompts first
    groups = [[(group.lanes, group.has_grammar) for group in harness.step().decode_groups] for _ in range(4)]
    free, masked = ([1], False), ([0, 2], True)
    assert groups == [[], [free], [free, masked], [free]]
    harness.run()
    harness.assert_all_as_expected()


# Steps that take as much of the pause as they do here.
STEP_S = _PAUSE_S / 5.9


@pytest.mark.parametrize(("num_free", "num_masked", "num_between"), [(2, 1, 5), (1, 1, 5), (1, 2, 2), (1, 3, 1), (0, 2, 1)])
def test_lanes_with_a_grammar_leave_time_to_as_many_others(num_free, num_masked, num_between):
    """Where there are none, only their own results are waited for."""
    harness = Harness(max_steps_in_flight=1, tree_size=4, num_blocks=64, step_s=STEP_S)
    for number in range(num_free + num_masked):
        harness.add([number, 2], max_tokens=60, **({"grammar": GRAMMAR} if number >= num_free else {}))
    groups = [harness.step().decode_groups for _ in range(18)]
    steps = [step for step, found in enumerate(groups) if any(group.has_grammar for group in found)]
    assert {later - earlier - 1 for earlier, later in itertools.pairwise(steps)} == {num_between}
    harness.run()
    harness.assert_all_as_expected()


def test_lanes_with_a_grammar_take_every_second_step_where_steps_are_long():
    harness = Harness(max_steps_in_flight=1, tree_size=4, step_s=2 * _PAUSE_S)
    harness.add([1, 2], max_tokens=40, grammar=GRAMMAR)
    harness.add([3, 4], max_tokens=40)
    groups = [harness.step().decode_groups for _ in range(9)]
    assert [any(group.has_grammar for group in found) for found in groups[2:]] == [True, False, True, False, True, False, True]


def test_lanes_with_a_grammar_run_in_every_step_where_none_is_in_flight():
    harness = Harness(tree_size=4)
    harness.add([1, 2], max_tokens=20, grammar=GRAMMAR)
    harness.step()
    assert harness.step().decode_groups == harness.step().decode_groups == [DecodeGroup(lanes=[0], num_nodes=4, has_grammar=True)]


def test_a_lane_that_the_device_gives_up_is_closed():
    harness = Harness()
    request_id = harness.add([1, 2], max_tokens=20, grammar=GRAMMAR)
    harness.step()
    plan = harness.scheduler.schedule()
    result = harness.runner.submit(plan)
    given_up = LaneResult(lane=0, uid=result.lanes[0].uid, token_ids=[], finish_reason=FinishReason.ABORT)
    (delta,) = harness.scheduler.update(type(result)(step_id=result.step_id, lanes=[given_up]))
    assert (delta.request_id, delta.token_ids, delta.finish_reason) == (request_id, [], FinishReason.ABORT)
    assert harness.step().leaves == [0]
    harness.assert_idle()
