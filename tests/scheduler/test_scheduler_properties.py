"""Whatever arrives and whenever: right outputs, no leaks, nobody starves."""

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from medusa_core.errors import ContextLengthError, QueueFullError
from medusa_core.params import Grammar
from tests.scheduler.harness import Harness

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=18)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests with few distinct tokens (so that prefixes meet) on a pool that holds one to three of them."""

    @initialize(
        steps_in_flight=st.integers(0, 1),
        num_blocks=st.integers(5, 14),
        tree_size=st.sampled_from([1, 2, 4, 8, 16]),
        max_step_tokens=st.integers(1, 12),
        enable_prefix_cache=st.booleans(),
        has_late_results=st.booleans(),
        seed=st.integers(0, 99),
    )
    def build(self, steps_in_flight, num_blocks, tree_size, max_step_tokens, enable_prefix_cache, has_late_results, seed):
        self.harness = Harness(
            max_steps_in_flight=steps_in_flight,
            num_blocks=num_blocks,
            tree_size=tree_size,
            max_depth=min(3, tree_size - 1),
            max_step_tokens=max_step_tokens,
            max_num_seqs=3,
            max_step_rows=24,
            max_queued_requests=8,
            enable_prefix_cache=enable_prefix_cache,
            max_model_len=36,
            has_late_results=has_late_results,
            seed=seed,
        )

    @rule(
        prompt=PROMPTS,
        max_tokens=st.none() | st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.integers(0, 2),
        stop=st.lists(st.integers(0, 22), max_size=3),
        is_speculation_enabled=st.booleans(),
        max_nodes=st.sampled_from([None, None, 1, 3, 100]),
        grammar=st.none() | st.just(Grammar(kind="regex", text=".*")),
    )
    def add(self, prompt, max_tokens, n, priority, stop, is_speculation_enabled, max_nodes, grammar):
        with contextlib.suppress(QueueFullError, ContextLengthError):
            self.harness.add(
                prompt,
                max_tokens=max_tokens,
                n=n,
                priority=priority,
                stop_token_ids=tuple(stop),
                is_speculation_enabled=is_speculation_enabled,
                max_nodes=max_nodes,
                grammar=grammar,
            )

    @rule(data=st.data(), extra=st.lists(st.integers(0, 1), max_size=3))
    def add_next_turn(self, data, extra):
        """A prompt made of an earlier prompt and its output so far, as in a conversation: hits reach into generated blocks."""
        if self.harness.requests:
            earlier = data.draw(st.sampled_from(sorted(self.harness.requests)))
            prompt = self.harness.requests[earlier].prompt_token_ids + self.harness.tokens(earlier) + extra
            with contextlib.suppress(QueueFullError, ContextLengthError):
                self.harness.add(prompt)

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.harness.step()

    @rule(data=st.data(), choice_idx=st.none() | st.integers(0, 2))
    def abort(self, data, choice_idx):
        if self.harness.requests:
            self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.requests))), choice_idx)

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.run()
            self.harness.assert_all_as_expected()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("steps_in_flight", [0, 1])
@pytest.mark.parametrize("enable_prefix_cache", [True, False])
def test_preemption_is_forced_and_changes_nothing(steps_in_flight, enable_prefix_cache):
    """A pool of one and a half requests, three requests on it."""
    harness = Harness(num_blocks=9, max_steps_in_flight=steps_in_flight, enable_prefix_cache=enable_prefix_cache)
    for first_token in range(3):
        harness.add([first_token, 7, 8, 9], max_tokens=20)
    harness.run()
    harness.assert_all_as_expected()
    assert harness.scheduler.stats().num_preemptions_total > 0
