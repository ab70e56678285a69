"""The scheduler's decisions, one at a time. Block size 4, 8 prefill tokens a step, 4 lanes unless a test says otherwise."""

import pytest

from medusa_core.errors import ContextLengthError, InvalidParameterError, PromptError, QueueFullError
from medusa_core.outputs import FinishReason
from medusa_core.plan import DecodeGroup
from tests.scheduler.harness import Harness


def sizes(plan):
    return {group.num_nodes: len(group.lanes) for group in plan.decode_groups}


def test_a_request_runs_from_prompt_to_end():
    harness = Harness()
    request_id = harness.add(range(5), max_tokens=9)
    first = harness.step()
    assert [(c.start, c.num_tokens, c.is_last) for c in first.chunks] == [(0, 5, True)]
    assert first.decode_groups == []
    second = harness.step()
    assert second.decode_groups == [DecodeGroup(lanes=[0], num_nodes=8)]
    harness.run()
    harness.assert_all_as_expected()
    assert len(harness.tokens(request_id)) == 9
    assert harness.reason(request_id) is FinishReason.LENGTH


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    harness = Harness()
    harness.add(range(3), max_tokens=30)
    harness.step()
    harness.add(range(20))
    plans = [harness.step() for _ in range(3)]
    assert [[(c.start, c.num_tokens, c.is_last) for c in plan.chunks] for plan in plans] == [
        [(0, 8, False)],
        [(8, 8, False)],
        [(16, 4, True)],
    ]
    assert all(sizes(plan) == {8: 1} for plan in plans)
    assert sizes(harness.step()) == {8: 2}


def test_the_prefill_budget_is_shared_by_prompts_in_order():
    harness = Harness()
    harness.add(range(5))
    harness.add(range(10, 15))
    assert [(c.lane, c.num_tokens) for c in harness.step().chunks] == [(0, 5), (1, 3)]


def test_a_lane_decodes_the_step_after_its_last_chunk_before_the_result_is_in():
    harness = Harness(max_steps_in_flight=1)
    request_id = harness.add(range(5))
    harness.step()
    assert harness.deltas[request_id, 0] == []
    assert sizes(harness.step()) == {8: 1}
    harness.run()
    harness.assert_all_as_expected()


def test_blocks_are_reserved_for_the_longest_outcome_in_flight():
    harness = Harness(max_steps_in_flight=1, tree_size=4, max_depth=3)
    harness.add(range(5), max_tokens=20)
    harness.step()
    harness.step()
    # Known so far: at least 5; at most 5 + 1 (prefill) + 4 (decode) = 10. Slots 0..9-1+4 of blocks of 4 tokens.
    appended = harness.step().block_appends
    table = harness.runner.lanes[0].block_ids
    assert appended
    assert len(table) * 4 >= 10 - 1 + 4


def test_a_lane_that_surely_finished_is_not_scheduled_again():
    harness = Harness(max_steps_in_flight=1)
    harness.add(range(5), max_tokens=1)
    assert harness.step().chunks[0].is_last
    assert not harness.step().has_rows
    harness.run()
    harness.assert_all_as_expected()


def test_the_first_delta_tells_queue_time_and_cached_tokens():
    harness = Harness(step_s=0.0)
    harness.add(range(9))
    harness.run()
    request_id = harness.add(range(9), arrival_s=2.0)
    harness.run()
    first, *rest = harness.deltas[request_id, 0]
    assert (first.is_first, first.num_cached_tokens, first.queue_s) == (True, 8, 3.0)
    assert all((d.is_first, d.num_cached_tokens, d.queue_s) == (False, 0, 0.0) for d in rest)


def test_prefix_hits_are_not_computed_again_and_are_counted():
    harness = Harness()
    for _ in range(2):
        harness.add(range(14), max_tokens=1)
        harness.run()
    assert harness.runner.computed_tokens == 14 + 2
    stats = harness.scheduler.stats()
    assert (stats.num_prefix_query_tokens_total, stats.num_prefix_hit_tokens_total) == (28, 12)


def test_the_block_of_a_last_token_that_was_never_computed_is_not_shared():
    harness = Harness()
    first = harness.add(range(5), max_tokens=3)
    harness.run()
    second = harness.add([*range(5), *harness.tokens(first), 1])
    harness.run()
    harness.assert_all_as_expected()
    assert harness.deltas[second, 0][0].num_cached_tokens == 4


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
def test_siblings_wait_for_the_prompt_and_share_its_full_blocks(enable_prefix_cache):
    harness = Harness(enable_prefix_cache=enable_prefix_cache)
    request_id = harness.add(range(14), n=3, max_tokens=12)
    for _ in range(2):
        assert len({chunk.lane for chunk in harness.step().chunks}) == 1
        assert harness.scheduler.num_running == 1
    joins = harness.step().joins
    assert [join.num_computed_tokens for join in joins] == [12, 12]
    assert joins[0].block_ids[:3] == joins[1].block_ids[:3] == harness.runner.lanes[0].block_ids[:3]
    harness.run()
    harness.assert_all_as_expected()
    assert len({tuple(harness.tokens(request_id, choice_idx)) for choice_idx in range(3)}) == 3


def test_a_choice_takes_over_when_the_one_computing_the_prompt_is_aborted():
    harness = Harness()
    request_id = harness.add(range(20), n=3)
    harness.step()
    harness.abort(request_id, 0)
    assert harness.scheduler.num_waiting == 2
    assert len(harness.step().joins) == 1
    harness.run()
    harness.assert_all_as_expected()
    assert harness.reason(request_id, 2) is FinishReason.LENGTH


def test_lower_priority_values_run_first_then_arrival():
    harness = Harness(max_num_seqs=1)
    for name, priority in [("late", 1), ("first", 0), ("second", 0)]:
        harness.add(range(4), request_id=name, priority=priority, max_tokens=1)
    order = []
    while harness.scheduler.has_work:
        harness.step()
        order += [name for name in harness.requests if harness.reason(name) and name not in order]
    assert order == ["first", "second", "late"]


def test_preemption_takes_the_worst_and_never_a_better_one():
    harness = Harness(num_blocks=9, tree_size=1, max_depth=0)
    worse = harness.add([1, 2, 3, 4], priority=1, max_tokens=20)
    better = harness.add([5, 6, 7, 8], priority=0, max_tokens=20)
    while not harness.reason(better):
        harness.step()
    assert harness.scheduler.stats().num_preemptions_total == 1
    assert harness.reason(worse) is None
    assert harness.tokens(worse)
    harness.run()
    harness.assert_all_as_expected()


@pytest.mark.parametrize("steps_in_flight", [0, 1])
def test_the_tree_shrinks_before_anyone_is_preempted(steps_in_flight):
    """A request alone that will fill the pool to its last slot."""
    harness = Harness(num_blocks=4, tree_size=16, max_steps_in_flight=steps_in_flight)
    harness.add(range(8), max_tokens=8)
    harness.step()
    assert sizes(harness.step()) == {8: 1}
    harness.run()
    harness.assert_all_as_expected()
    assert harness.scheduler.stats().num_preemptions_total == 0


def test_a_preempted_request_takes_late_tokens_and_waits_for_them():
    harness = Harness(num_blocks=9, tree_size=1, max_depth=0, max_steps_in_flight=1)
    ids = [harness.add([first, 6, 7, 8], max_tokens=20) for first in (1, 2)]
    while harness.scheduler.stats().num_preemptions_total == 0:
        assert len(harness.pending) <= 1
        num_tokens = len(harness.tokens(ids[1]))
        harness.step()
    assert len(harness.tokens(ids[1])) == num_tokens + 1
    harness.run()
    harness.assert_all_as_expected()


def test_a_preempted_request_is_not_resumed_while_its_results_are_out():
    harness = Harness(num_blocks=9, tree_size=1, max_depth=0, max_steps_in_flight=1)
    ids = [harness.add([first, 6, 7, 8], max_tokens=20) for first in (1, 2)]
    while harness.scheduler.stats().num_preemptions_total == 0:
        plan = harness.scheduler.schedule()
        harness.pending.append((harness.runner.submit(plan), set()))
        if len(harness.pending) > 2:
            harness._take(harness.scheduler.update(harness._read()))
    harness.abort(ids[0])
    # Room for it is there now, but two of its steps have not come back.
    assert harness.scheduler.schedule().joins == []


def test_admission_leaves_a_block_to_each_running_lane():
    harness = Harness(num_blocks=5, max_step_tokens=64, max_depth=0)
    for prompt in ([1] * 4, [2] * 8, [3] * 8):
        harness.add(prompt, max_tokens=4)
    # Two blocks are left and would hold the third prompt, but then the other two could not grow.
    assert [join.uid for join in harness.step().joins] == [0, 1]
    harness.run()
    harness.assert_all_as_expected()
    assert harness.scheduler.stats().num_preemptions_total == 0


def test_the_row_budget_limits_the_tree():
    harness = Harness(max_step_rows=20, max_step_tokens=64, tree_size=16)
    for first in range(3):
        harness.add([first, 5], max_tokens=10)
    harness.step()
    assert sizes(harness.step()) == {4: 3}


def test_a_request_gets_no_larger_tree_than_it_asks_for():
    harness = Harness()
    harness.add([1, 2], max_tokens=20)
    harness.add([3, 4], max_tokens=20, max_nodes=5)
    harness.add([5, 6], max_tokens=20, max_nodes=1)
    harness.step()
    assert sizes(harness.step()) == {8: 1, 4: 1, 1: 1}
    harness.run()
    harness.assert_all_as_expected()


def test_requests_without_speculation_share_the_step_at_one_row():
    harness = Harness()
    harness.add([1, 2], max_tokens=20)
    harness.add([3, 4], max_tokens=20, is_speculation_enabled=False)
    harness.step()
    assert sizes(harness.step()) == {8: 1, 1: 1}
    assert harness.scheduler.stats().tree_size == 8


def test_without_heads_every_step_is_plain():
    harness = Harness(max_depth=0)
    harness.add([1, 2])
    harness.step()
    assert sizes(harness.step()) == {1: 1}


@pytest.mark.parametrize("steps_in_flight", [0, 1])
def test_abort_frees_blocks_at_once_and_the_lane_in_the_next_plan(steps_in_flight):
    harness = Harness(max_steps_in_flight=steps_in_flight)
    request_id = harness.add(range(6), max_tokens=30)
    for _ in range(3):
        harness.step()
    harness.abort(request_id)
    assert harness.cache.num_used_blocks == 0
    assert harness.reason(request_id) is FinishReason.ABORT
    assert harness.step().leaves == [0]
    harness.run()
    harness.assert_all_as_expected()


def test_abort_of_unknown_requests_and_choices_is_ignored():
    harness = Harness()
    request_id = harness.add(range(6))
    assert harness.scheduler.abort("nobody") == []
    assert harness.scheduler.abort(request_id, 7) == []
    harness.run()
    assert harness.scheduler.abort(request_id) == []


def test_a_waiting_request_can_be_aborted():
    harness = Harness(max_num_seqs=1)
    harness.add(range(4), max_tokens=20)
    harness.step()
    waiting = harness.add(range(4), n=2)
    assert harness.scheduler.num_waiting == 2
    harness.abort(waiting)
    assert harness.scheduler.num_waiting == 0
    harness.run()
    harness.assert_all_as_expected()
    assert harness.tokens(waiting) == []


def test_stop_tokens_end_a_request_in_the_middle_of_a_path():
    harness = Harness(max_steps_in_flight=1)
    plain = harness.add(range(6), max_tokens=30)
    harness.run()
    stop = harness.tokens(plain)[5]
    stopped = harness.add(range(6), max_tokens=30, stop_token_ids=(stop,))
    harness.run()
    harness.assert_all_as_expected()
    assert harness.reason(stopped) is FinishReason.STOP
    assert harness.tokens(stopped)[-1] == stop


def test_a_burst_takes_the_free_lanes_before_it_fills_the_queue():
    harness = Harness(max_num_seqs=3, max_queued_requests=2)
    for _ in range(5):
        harness.add([1])
    with pytest.raises(QueueFullError):
        harness.add([1])
    harness.step()
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (3, 2)


def test_a_full_queue_refuses_and_names_the_limit():
    harness = Harness(max_num_seqs=1, max_queued_requests=2)
    harness.add([1])
    harness.step()
    harness.add([1])
    with pytest.raises(QueueFullError, match=r"1 choices wait, 2 more would exceed the limit of 2 \(max_queued_requests\)"):
        harness.add([2], n=2)
    harness.add([2])


def test_more_choices_than_the_queue_holds_can_never_wait():
    with pytest.raises(InvalidParameterError, match="n must be at most 2"):
        Harness(max_queued_requests=2).add([1], n=3)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "param"),
    [(64, None, "prompt"), (70, 1, "prompt"), (60, 5, "max_tokens")],
)
def test_requests_beyond_the_context_are_refused(num_prompt, max_tokens, param):
    with pytest.raises(ContextLengthError, match="maximum context length is 64 tokens") as caught:
        Harness().add([1] * num_prompt, max_tokens=max_tokens)
    assert caught.value.param == param


def test_the_longest_request_that_fits_is_accepted():
    harness = Harness(num_blocks=16)
    harness.add([1] * 60, max_tokens=4)
    harness.add([2] * 63, max_tokens=None)
    harness.run()
    harness.assert_all_as_expected()


def test_a_request_larger_than_the_cache_is_refused_with_the_arithmetic():
    with pytest.raises(ContextLengthError, match=r"3 blocks x 4 = 12 tokens, but the request needs 13: 10 .* and 3 of output"):
        Harness(num_blocks=3).add([1] * 10, max_tokens=3)


def test_without_max_tokens_a_small_cache_ends_the_output():
    harness = Harness(num_blocks=3)
    request_id = harness.add([1] * 10, max_tokens=None)
    harness.run()
    assert len(harness.tokens(request_id)) == 2


def test_empty_prompts_and_ids_in_use_are_refused():
    harness = Harness()
    with pytest.raises(PromptError, match="empty"):
        harness.add([])
    harness.add([1], request_id="a")
    with pytest.raises(InvalidParameterError, match="'a' is in use"):
        harness.add([1], request_id="a")


def test_an_idle_scheduler_plans_nothing():
    harness = Harness()
    assert harness.step().is_empty
    assert not harness.scheduler.has_work
    assert harness.scheduler.stats().num_steps_total == 0


def test_stats_describe_the_moment():
    harness = Harness(max_num_seqs=1)
    harness.add(range(6), max_tokens=20)
    harness.add(range(6))
    harness.step()
    stats = harness.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used, stats.num_blocks) == (1, 1, 2, 32)
    assert stats.num_steps_total == 1


def test_a_forced_tree_size_holds_from_the_next_plan_on_and_never_changes_tokens():
    harness = Harness(tree_size=8)
    harness.add(range(5), max_tokens=40)
    sizes = []
    for forced in (4, 1, None):
        harness.scheduler.force_tree_size(forced)
        plans = [harness.step() for _ in range(3)]
        sizes.append({group.num_nodes for plan in plans for group in plan.decode_groups})
        assert harness.scheduler.stats().tree_size == (forced or 8)
    assert sizes == [{4}, {1}, {8}]
    harness.run()
    harness.assert_all_as_expected()
