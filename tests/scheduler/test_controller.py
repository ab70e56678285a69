"""Tree sizes: fixed, and chosen from measured costs."""

import pytest

from medusa_core.errors import ConfigError
from medusa_core.scheduler.controller import FixedTreeSize, MeasuredTreeSize, tree_sizes
from medusa_core.scheduler.costs import CapturedCosts, CostCurve, PackedCosts
from tests.scheduler.harness import Harness

# Of the published 7B heads.
EXPECTED = {1: 1.0, 4: 1.74, 8: 2.0, 16: 2.2, 32: 2.35, 64: 2.47}
FREE = CostCurve(((1, 0.0),))
FLAT = CostCurve(((1, 1.0), (2048, 1.0)))
# Flat up to 32 rows, then proportional: a machine that becomes compute-bound.
ROOFLINE = CostCurve(((1, 1.0), (32, 1.0), (64, 2.0)))


def measured(forward, *, draft=FREE, max_step_rows=1024, expected=EXPECTED):
    return MeasuredTreeSize(expected, PackedCosts(forward, draft), max_step_rows=max_step_rows)


def test_costs_are_linear_between_points_and_go_on_beyond_them():
    assert [ROOFLINE.seconds(rows) for rows in (0, 1, 16, 32, 48, 64, 96)] == [1.0, 1.0, 1.0, 1.0, 1.5, 2.0, 3.0]


def test_one_measured_point_is_a_constant():
    assert CostCurve(((8, 0.5),)).seconds(100) == 0.5


def test_noise_at_the_end_of_a_curve_never_makes_more_rows_cheaper():
    assert CostCurve(((1, 1.0), (8, 0.5))).seconds(16) == 0.5


@pytest.mark.parametrize("points", [(), ((4, 1.0), (4, 2.0)), ((8, 1.0), (4, 2.0)), ((1, -1.0),), ((1, float("nan")),)])
def test_a_curve_that_is_none_is_refused(points):
    with pytest.raises(ConfigError, match="cost curve"):
        CostCurve(points)


def test_points_may_come_in_any_order():
    assert CostCurve.from_points([(8, 2.0), (1, 1.0)]).points == ((1, 1.0), (8, 2.0))


def test_sizes_are_the_padded_ones_and_the_one_asked_for():
    assert tree_sizes(10) == (1, 4, 8, 10)
    assert tree_sizes(64) == (1, 4, 8, 16, 32, 64)
    assert tree_sizes(1) == (1,)


def test_a_fixed_size_is_used_as_long_as_its_rows_fit():
    controller = FixedTreeSize(10, max_step_rows=40)
    assert [controller.choose(lanes) for lanes in (1, 4, 5, 6, 10, 11, 40)] == [10, 10, 8, 4, 4, 1, 1]
    assert controller.choose(4, num_plain_lanes=1) == 8
    assert controller.chosen == 8


def test_when_rows_are_free_the_largest_tree_wins():
    assert measured(FLAT).choose(4) == 64


def test_the_tree_shrinks_as_lanes_fill_the_machine():
    controller = measured(ROOFLINE)
    chosen = [controller.choose(lanes) for lanes in (1, 2, 4, 8, 32, 64)]
    assert chosen == [32, 16, 8, 4, 1, 1]
    assert controller.chosen == 1


def test_prefill_and_plain_rows_use_the_machine_up_too():
    assert measured(ROOFLINE).choose(1, num_prefill_rows=0) == 32
    # Beside 31 rows of prompts each row of the tree has its price, where alone it would be free.
    assert measured(ROOFLINE).choose(1, num_prefill_rows=31) < 32
    assert measured(ROOFLINE).choose(4, num_plain_lanes=16) < measured(ROOFLINE).choose(4)


@pytest.mark.parametrize("num_prefill_rows", [0, 64, 512])
def test_a_tree_does_not_look_free_beside_a_long_prefill(num_prefill_rows):
    """Prefill launches of their own: whatever they take, a tree pays that is worth it in a step that only decodes."""
    decode = {
        (lanes, nodes): seconds
        for nodes, *costs in ((1, 1.0, 1.0), (4, 1.5, 1.8))
        for lanes, seconds in zip((8, 64), costs, strict=True)
    }
    controller = MeasuredTreeSize({1: 1.0, 4: 1.7}, CapturedCosts(decode, {64: 1.0, 512: 5.0}), max_step_rows=1024)
    assert controller.choose(8, num_prefill_rows=num_prefill_rows) == 4
    assert controller.choose(64, num_prefill_rows=num_prefill_rows) == 1


def test_the_decode_part_of_a_step_that_shares_one_pass():
    costs = PackedCosts(CostCurve(((1, 1.0), (101, 2.0))), CostCurve(((1, 0.25), (5, 0.75))))
    assert costs.decode_seconds(((1, 11),)) == (1.1, 0.0)
    # 3 x 16 + 2 x 4 + 5 rows, five lanes that draft
    assert costs.decode_seconds(((16, 3), (1, 5), (4, 2))) == pytest.approx((1.6 + 0.75, 0.75))


def test_the_decode_part_of_a_captured_step():
    decode = {(1, 1): 1.0, (4, 1): 2.0, (1, 8): 3.0, (4, 8): 5.0, (1, 16): 6.0}
    costs = CapturedCosts(decode, {64: 9.0}, {(1, 8): 0.5, (3, 8): 0.7, (1, 16): 0.25})
    # launches are filled up; drafting is interpolated
    assert costs.decode_seconds(((8, 2), (1, 3))) == pytest.approx((5.0 + 2.0, 0.6))
    assert costs.decode_seconds(((16, 1),)) == (6.0, 0.25)
    assert CapturedCosts(decode, {64: 9.0}).decode_seconds(((8, 2),)) == (5.0, 0.0)


def test_a_draft_that_costs_more_than_it_brings_is_not_made():
    assert measured(FLAT, draft=CostCurve(((1, 2.0),))).choose(1) == 1
    assert measured(FLAT, draft=CostCurve(((1, 0.5),))).choose(1) == 64


def test_a_larger_tree_must_win_clearly():
    # 1 % more tokens for the same time: stay small. 10 %: go.
    assert measured(FLAT, expected={1: 1.0, 4: 1.5, 8: 1.515}).choose(1) == 4
    assert measured(FLAT, expected={1: 1.0, 4: 1.5, 8: 1.65}).choose(1) == 8


def test_small_gains_add_up():
    assert measured(FLAT, expected={1: 1.0, 4: 1.03, 8: 1.06}).choose(1) == 8


def test_the_row_budget_holds():
    assert measured(FLAT, max_step_rows=64).choose(8) == 8
    assert measured(FLAT, max_step_rows=64).choose(8, num_plain_lanes=1) == 4


@pytest.mark.parametrize("make", [lambda: measured(ROOFLINE, max_step_rows=64), lambda: FixedTreeSize(64, max_step_rows=64)])
def test_a_size_can_be_forced_within_the_row_budget_and_given_back(make):
    controller = make()
    usual = [controller.choose(lanes) for lanes in (1, 2, 32)]
    controller.force(16)
    assert [controller.choose(lanes) for lanes in (1, 4, 5, 64)] == [16, 16, 8, 1]
    assert controller.choose(4, num_plain_lanes=1) == controller.chosen == 8
    controller.force(1)
    assert controller.choose(1) == controller.chosen == 1
    controller.force(None)
    assert [controller.choose(lanes) for lanes in (1, 2, 32)] == usual


@pytest.mark.parametrize("controller", [measured(FLAT, expected={1: 1.0, 4: 1.5, 8: 1.7}), FixedTreeSize(8, max_step_rows=64)])
def test_a_forced_size_that_does_not_exist_is_refused_and_changes_nothing(controller):
    controller.force(4)
    with pytest.raises(ConfigError, match=r"no tree of 5 nodes.*1, 4, 8"):
        controller.force(5)
    assert controller.choose(1) == 4


def test_live_acceptance_corrects_the_expectation_within_bounds():
    costs = CostCurve(((1, 1.0), (64, 1.5)))
    controller = measured(costs)
    assert controller.correction == 1.0
    before = controller.choose(1)
    for _ in range(2000):
        controller.observe(before, 0)
    assert controller.correction == pytest.approx(MeasuredTreeSize.CORRECTION_RANGE[0], abs=0.01)
    assert controller.choose(1) < before
    for _ in range(5000):
        controller.observe(before, 4)
    assert controller.correction == MeasuredTreeSize.CORRECTION_RANGE[1]


def test_results_as_expected_leave_the_correction_alone():
    controller = measured(FLAT, expected={1: 1.0, 4: 2.0})
    for _ in range(100):
        controller.observe(4, 1)
    assert controller.correction == pytest.approx(1.0)


def test_after_plain_steps_speculation_is_tried_again():
    controller = measured(FLAT, draft=CostCurve(((1, 0.6),)))
    assert controller.choose(1) > 1
    for _ in range(2000):
        controller.observe(64, 0)
    sizes = [controller.choose(1) for _ in range(30_000)]
    assert sizes[0] == 1
    assert sizes[-1] > 1


def test_without_draft_nodes_there_is_nothing_to_choose():
    controller = measured(FLAT, expected={1: 1.0})
    assert controller.choose(3) == 1
    assert controller.correction == 1.0


def test_the_scheduler_reports_acceptance_to_its_controller():
    controller = measured(FLAT, expected={1: 1.0, 4: 1.9, 8: 2.5}, max_step_rows=64)
    harness = Harness(controller=controller)
    request_id = harness.add(range(5), max_tokens=40)
    harness.run()
    harness.assert_all_as_expected()
    drafted = [delta for delta in harness.deltas[request_id, 0] if delta.num_draft_nodes]
    assert {delta.num_draft_nodes for delta in drafted} == {7}
    replay = measured(FLAT, expected={1: 1.0, 4: 1.9, 8: 2.5}, max_step_rows=64)
    for delta in drafted[:-1]:
        replay.observe(8, delta.num_accepted)
    assert controller.correction == replay.correction != 1.0


@pytest.mark.parametrize("seconds_of_64_rows", [1.5, 4.0, 20.0])
def test_heads_that_are_never_right_cost_next_to_nothing(seconds_of_64_rows):
    """Whatever the calibration promised: retries included, 30,000 steps take at most 3 % longer than plain ones."""
    costs = CostCurve(((1, 1.0), (64, seconds_of_64_rows)))
    controller = measured(costs)
    total = 0.0
    for _ in range(30_000):
        size = controller.choose(1)
        total += costs.seconds(size)
        if size > 1:
            controller.observe(size, 0)
    assert total <= 1.03 * 30_000
