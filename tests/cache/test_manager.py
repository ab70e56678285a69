"""Block tables: what is shared, what is not, and that nothing leaks."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from medusa_core.cache.manager import CacheManager
from medusa_core.params import SamplingParams
from medusa_core.request import Request


def make_request(uid, prompt, *, request_id=None, cache_salt=""):
    return Request(
        uid=uid,
        request_id=request_id or f"r{uid}",
        choice_idx=0,
        prompt_token_ids=list(prompt),
        params=SamplingParams(),
        noise_key=0,
        max_total_tokens=100,
        cache_salt=cache_salt,
    )


def make_cache(num_blocks=8, **options):
    return CacheManager(num_blocks=num_blocks, block_size=4, **options)


def run_and_free(cache, request):
    """Compute all known tokens of a request, then let it go."""
    allocation = cache.allocate(request, request.num_known_tokens)
    cache.commit(request, request.num_known_tokens)
    cache.free(request)
    return allocation.block_ids


def test_a_table_covers_the_slots_asked_for():
    cache = make_cache()
    request = make_request(0, range(6))
    assert len(cache.allocate(request, 6).block_ids) == 2
    assert cache.num_blocks_missing(request, 8) == 0
    assert cache.extend(request, 8) == []
    assert len(cache.extend(request, 13)) == 2
    assert (cache.num_used_blocks, cache.num_free_blocks) == (4, 4)
    cache.free(request)
    assert cache.num_used_blocks == 0


def test_without_room_nothing_changes():
    cache = make_cache(num_blocks=2)
    run_and_free(cache, make_request(0, range(4)))
    request = make_request(1, range(12))
    assert cache.allocate(request, 12) is None
    assert cache.num_free_blocks == 2
    assert cache.num_prefix_query_tokens == 4
    assert len(cache.lookup(request)) == 1


def test_spare_blocks_stay_free():
    cache = make_cache(num_blocks=4)
    assert cache.allocate(make_request(0, range(9)), 9, num_spare_blocks=2) is None
    assert cache.allocate(make_request(0, range(9)), 9, num_spare_blocks=1) is not None


def test_a_freed_prefix_is_found_again():
    cache = make_cache()
    blocks = run_and_free(cache, make_request(0, range(10)))
    allocation = cache.allocate(make_request(1, range(10)), 10)
    assert allocation.block_ids[:2] == blocks[:2]
    assert allocation.num_cached_tokens == 8
    assert (cache.num_prefix_query_tokens, cache.num_prefix_hit_tokens) == (20, 8)


def test_one_token_is_always_left_to_compute():
    cache = make_cache()
    run_and_free(cache, make_request(0, range(8)))
    assert cache.allocate(make_request(1, range(8)), 8).num_cached_tokens == 4


def test_only_full_confirmed_blocks_are_shared():
    cache = make_cache()
    request = make_request(0, range(12))
    cache.allocate(request, 12)
    cache.commit(request, 7)
    assert len(cache.lookup(make_request(1, range(12)))) == 1


def test_blocks_that_span_prompt_and_output_are_found_by_both():
    cache = make_cache()
    request = make_request(0, range(6))
    request.output_token_ids += [6, 7, 8, 9, 10]
    run_and_free(cache, request)
    assert len(cache.lookup(make_request(1, range(11)))) == 2
    assert len(cache.lookup(make_request(2, [*range(6), 6, 99, 8, 9, 10]))) == 1


def test_a_live_block_is_shared_not_copied():
    cache = make_cache()
    first, second = make_request(0, range(8)), make_request(1, range(8))
    blocks = cache.allocate(first, 8).block_ids
    cache.commit(first, 8)
    assert cache.allocate(second, 8).block_ids[0] == blocks[0]
    assert cache.num_used_blocks == 3
    cache.free(first)
    assert cache.num_used_blocks == 2
    cache.free(second)
    assert cache.num_used_blocks == 0


def test_the_end_of_a_sequence_is_reused_before_its_start():
    cache = make_cache(num_blocks=3)
    run_and_free(cache, make_request(0, range(12)))
    cache.allocate(make_request(1, [99] * 8), 8)
    assert len(cache.lookup(make_request(2, range(12)))) == 1


def test_a_reused_block_is_no_longer_found():
    cache = make_cache(num_blocks=2)
    run_and_free(cache, make_request(0, range(8)))
    other = make_request(1, [99] * 8)
    cache.allocate(other, 8)
    assert cache.lookup(make_request(2, range(8))) == []


def test_identical_requests_side_by_side_index_one_copy():
    cache = make_cache()
    twins = [make_request(uid, range(9)) for uid in range(2)]
    for request in twins:
        cache.allocate(request, 9)
    for request in twins:
        cache.commit(request, 9)
        cache.free(request)
    assert cache.num_used_blocks == 0
    assert len(cache.lookup(make_request(2, range(9)))) == 2


def test_prompts_are_shared_within_a_salt_only():
    cache = make_cache()
    run_and_free(cache, make_request(0, range(9), cache_salt="a"))
    assert [len(cache.lookup(make_request(1, range(9), cache_salt=salt))) for salt in ("a", "b", "")] == [2, 0, 0]


def test_without_prefix_cache_only_choices_of_one_request_share():
    cache = make_cache(enable_prefix_cache=False)
    leader = make_request(0, range(9), request_id="same")
    cache.allocate(leader, 9)
    cache.commit(leader, 9)
    assert len(cache.lookup(make_request(1, range(9), request_id="same"))) == 2
    assert cache.lookup(make_request(2, range(9), request_id="other")) == []
    cache.free(leader)
    assert cache.lookup(make_request(3, range(9), request_id="same")) == []


def test_a_resumed_request_does_not_count_as_a_query():
    cache = make_cache()
    request = make_request(0, range(9))
    run_and_free(cache, request)
    request.num_preemptions = 1
    assert cache.allocate(request, 9).num_cached_tokens == 8
    assert (cache.num_prefix_query_tokens, cache.num_prefix_hit_tokens) == (9, 0)


class CacheMachine(RuleBasedStateMachine):
    """Random requests over few tokens; a model of the device's memory shows what each found block really holds."""

    def __init__(self):
        super().__init__()
        self.cache = make_cache(num_blocks=6)
        self.tables = {}
        self.memory = {}
        self.next_uid = 0

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def start(self, prompt):
        request = make_request(self.next_uid, prompt)
        allocation = self.cache.allocate(request, len(prompt))
        if allocation is None:
            return
        self.next_uid += 1
        num_cached_blocks = allocation.num_cached_tokens // 4
        for block_idx, block_id in enumerate(allocation.block_ids):
            if block_idx < num_cached_blocks:
                assert self.memory[block_id] == prompt[: (block_idx + 1) * 4]
            else:
                assert all(block_id not in block_ids for _, block_ids in self.tables.values())
                self.memory[block_id] = prompt[: (block_idx + 1) * 4]
        self.tables[request.uid] = (request, allocation.block_ids)

    @rule(data=st.data(), share=st.floats(0, 1))
    def commit(self, data, share):
        if self.tables:
            request, _ = data.draw(st.sampled_from(list(self.tables.values())))
            self.cache.commit(request, int(share * request.num_known_tokens))

    @rule(data=st.data())
    def free(self, data):
        if self.tables:
            request, _ = self.tables.pop(data.draw(st.sampled_from(list(self.tables))))
            self.cache.free(request)

    @invariant()
    def used_blocks_are_those_in_tables(self):
        held = {block_id for _, block_ids in self.tables.values() for block_id in block_ids}
        assert self.cache.num_used_blocks == len(held)

    def teardown(self):
        for request, _ in self.tables.values():
            self.cache.free(request)
        assert self.cache.num_free_blocks == 6


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("num_slots", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_slots(num_slots, num_blocks):
    assert make_cache().num_blocks_for(num_slots) == num_blocks
