"""What the engine counts of its steps agrees with what its callers got."""

import pytest

from medusa_core.params import Grammar
from medusa_core.scheduler.controller import MeasuredTreeSize
from medusa_core.scheduler.costs import CostCurve, PackedCosts
from medusa_core.scheduler.step_counts import StepCounts
from medusa_core.tree.topology import TreeTopology
from tests.scheduler.harness import Harness

# Nodes 1 to 6: head 1, lookup, head 1, head 2, lookup, head 2 again behind another candidate of head 1.
TREE = TreeTopology.from_choices([(0,), (-1,), (1,), (0, 0), (-1, -1), (1, 0)])
COSTS = PackedCosts(CostCurve(((1, 1.0), (17, 3.0))), CostCurve(((1, 0.5), (3, 1.0))))


def test_credit_goes_to_heads_by_rank_and_to_the_lookup():
    counts = StepCounts((1, 8), TREE, None)
    assert TREE.head_ranks == ((1, 0), (1, 1), (2, 0))
    for nodes in (1 << 1 | 1 << 4, 1 << 3 | 1 << 6, 1 << 2 | 1 << 5, 1 << 3, 1 << 2 | 1 << 4):
        counts.credit(nodes)
    assert counts.num_head_hits == [1, 2, 3]
    assert counts.num_lookup_hits == 3


def test_the_last_of_64_nodes_is_the_sign_bit():
    tree = TreeTopology.from_choices([(rank,) for rank in range(63)])
    counts = StepCounts((1, 64), tree, None)
    counts.credit(-(2**63))
    assert counts.num_head_hits == [0] * 62 + [1]


def test_steps_by_their_largest_tree():
    counts = StepCounts((1, 4, 8), TREE, None)
    for groups in ((), ((1, 3),), ((4, 1), (1, 2)), ((1, 2), (8, 1), (4, 1)), ((8, 2),)):
        counts.launch(groups)
    assert (counts.num_steps, counts.num_steps_by_size) == (5, [1, 1, 2])


def test_costs_of_a_step_and_of_its_tokens_without_drafts():
    counts = StepCounts((1, 8), TREE, COSTS)
    counts.land(((8, 2), (1, 1)), num_lanes=3, num_tokens=7)
    assert (counts.decode_cost_s, counts.draft_cost_s) == (3.0 + 0.75, 0.75)
    assert counts.plain_cost_s == pytest.approx(7 / 3 * 1.25)
    # Whose requests had all ended, and which only filled prompts.
    counts.land(((8, 2), (1, 1)), num_lanes=0, num_tokens=0)
    counts.land((), num_lanes=0, num_tokens=0)
    assert (counts.decode_cost_s, counts.draft_cost_s) == (7.5, 1.5)
    assert counts.plain_cost_s == pytest.approx(7 / 3 * 1.25)


def test_what_comes_with_a_step_that_only_fills_prompts_counts_as_well():
    counts = StepCounts((1, 8), TREE, COSTS)
    counts.land(((8, 2),), num_lanes=0, num_tokens=0)
    counts.land((), num_lanes=2, num_tokens=7)
    at_once = StepCounts((1, 8), TREE, COSTS)
    at_once.land(((8, 2),), num_lanes=2, num_tokens=7)
    assert (counts.decode_cost_s, counts.plain_cost_s) == (at_once.decode_cost_s, at_once.plain_cost_s)


@pytest.mark.parametrize("max_steps_in_flight", [0, 1])
def test_late_results_change_no_totals(max_steps_in_flight):
    """Lanes with a grammar beside a long prompt, so that their results come with steps that decode nothing."""
    totals = []
    for has_late_results in (False, True):
        controller = MeasuredTreeSize({1: 1.0, 4: 2.5, 8: 2.8}, COSTS, max_step_rows=64)
        harness = Harness(
            num_blocks=400,
            max_model_len=400,
            controller=controller,
            max_steps_in_flight=max_steps_in_flight,
            max_step_tokens=4,
            has_late_results=has_late_results,
        )
        for number in range(2):
            harness.add(range(number, number + 5), max_tokens=40, grammar=Grammar(kind="regex", text=".*"))
        harness.add([5] * 300, max_tokens=1)
        harness.run()
        harness.assert_all_as_expected()
        stats = harness.scheduler.stats()
        totals.append((stats.decode_cost_seconds_total, pytest.approx(stats.plain_cost_seconds_total)))
    assert totals[0][0] == totals[1][0] > 0
    assert totals[0][1] == totals[1][1].expected > 0


def test_plain_steps_are_as_fast_as_plain_decoding():
    counts = StepCounts((1, 8), TREE, COSTS)
    for num_lanes in (1, 2, 5):
        counts.land(((1, num_lanes),), num_lanes=num_lanes, num_tokens=num_lanes)
    assert counts.plain_cost_s == counts.decode_cost_s > counts.draft_cost_s == 0.0


@pytest.mark.parametrize("max_steps_in_flight", [0, 1])
@pytest.mark.parametrize("num_blocks", [9, 32])
def test_totals_of_mixed_traffic(num_blocks, max_steps_in_flight):
    """Preemptions, aborts, several choices and lanes without drafts."""
    controller = MeasuredTreeSize({1: 1.0, 4: 2.5, 8: 2.8}, COSTS, max_step_rows=64)
    harness = Harness(num_blocks=num_blocks, controller=controller, max_steps_in_flight=max_steps_in_flight)
    for number in range(6):
        harness.add(range(number, number + 7), max_tokens=9, n=1 + number % 2, is_speculation_enabled=number != 3)
    for _ in range(7):
        harness.step()
    harness.abort("r1")
    harness.run()
    harness.assert_all_as_expected()
    deltas = [delta for deltas in harness.deltas.values() for delta in deltas]
    stats = harness.scheduler.stats()
    assert (stats.num_preemptions_total > 0) == (num_blocks == 9)
    assert sum(stats.num_head_hits_total) == sum(delta.num_accepted for delta in deltas) > 0
    assert stats.num_lookup_hits_total == 0
    plans = harness.runner.plans
    assert stats.num_steps_total == sum(plan.has_rows for plan in plans)
    decoding = [plan for plan in plans if plan.decode_groups]
    largest = [max(group.num_nodes for group in plan.decode_groups) for plan in decoding]
    assert stats.num_steps_by_size_total == tuple(map(largest.count, controller.sizes))
    assert stats.decode_cost_seconds_total == pytest.approx(
        sum(COSTS.decode_seconds(tuple((g.num_nodes, len(g.lanes)) for g in plan.decode_groups)).step for plan in decoding)
    )
    assert 0 < stats.draft_cost_seconds_total < stats.decode_cost_seconds_total
    assert stats.plain_cost_seconds_total > 0


def test_without_measured_costs_there_are_no_costs():
    harness = Harness(tree_size=8)
    harness.add(range(5))
    harness.run()
    stats = harness.scheduler.stats()
    assert sum(stats.num_steps_by_size_total) > 0
    assert (stats.decode_cost_seconds_total, stats.draft_cost_seconds_total, stats.plain_cost_seconds_total) == (0.0, 0.0, 0.0)
