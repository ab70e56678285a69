"""How many nodes each lane's tree gets this step, the root included; 1 is plain decoding."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Protocol

from medusa_core.config import NODE_BUCKETS
from medusa_core.scheduler.costs import StepCosts


class TreeSizeController(Protocol):
    """Chooses a tree size per step.

    sizes: every size it may choose, increasing, from 1. chosen: the latest choice.
    """

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def chosen(self) -> int: ...

    def choose(self, num_lanes: int, *, num_plain_lanes: int = 0, num_prefill_rows: int = 0) -> int:
        """Nodes for each of `num_lanes` drafting lanes, in a step that also has lanes of one row and prefill rows."""
        ...

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """One lane's result: draft tokens accepted from a tree of `num_nodes` nodes."""
        ...


def tree_sizes(max_nodes: int) -> tuple[int, ...]:
    """The padded sizes below `max_nodes`, then `max_nodes` itself."""
    return (*(size for size in NODE_BUCKETS if size < max_nodes), max_nodes)


class FixedTreeSize:
    """The size asked for, or the largest padded size below it that the row budget allows."""

    def __init__(self, num_nodes: int, *, max_step_rows: int) -> None:
        self.sizes = tree_sizes(num_nodes)
        self.chosen = 1
        self._max_step_rows = max_step_rows

    def choose(self, num_lanes: int, *, num_plain_lanes: int = 0, num_prefill_rows: int = 0) -> int:
        self.chosen = allowed_sizes(self.sizes, num_lanes, self._max_step_rows - num_plain_lanes)[-1]
        return self.chosen

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """A fixed size learns nothing."""


def allowed_sizes(sizes: tuple[int, ...], num_lanes: int, max_rows: int) -> tuple[int, ...]:
    """The sizes whose rows fit `max_rows`; plain decoding always does (max_step_rows >= max_num_seqs)."""
    return tuple(size for size in sizes if size == 1 or num_lanes * size <= max_rows)


class MeasuredTreeSize:
    """The size with the most tokens per second: (lanes * E(n) + plain lanes) / t(rows).

    E(n) - 1, the draft tokens expected per step, comes from calibration and is corrected by live acceptance: one factor, a ratio of
    two moving averages. The source of the rule is Sequoia's hardware-aware tree choice, with a constant draft cost.

    expected_tokens: E(n) for each size, 1.0 for size 1.
    """

    # A larger tree must win by this much: rows measured at start-up are noisy, and fewer rows leave room for other requests.
    MIN_GAIN = 1.03
    CORRECTION_RANGE = (0.0, 2.0)
    # Weight of one lane's result: the average covers about the last 200.
    OBSERVATION_WEIGHT = 0.005
    # While steps are plain nothing is learnt about drafts, so the correction drifts back to 1 and speculation is tried again.
    # So slowly that heads that are never right cost 1 or 2 % of the time.
    DRIFT_PER_PLAIN_STEP = 0.0001

    def __init__(self, expected_tokens: Mapping[int, float], costs: StepCosts, *, max_step_rows: int) -> None:
        self.sizes = tuple(sorted({1, *expected_tokens}))
        self.chosen = 1
        self._expected_drafts = {size: expected_tokens[size] - 1.0 if size > 1 else 0.0 for size in self.sizes}
        self._costs = costs
        self._max_step_rows = max_step_rows
        # Moving averages of accepted and of expected draft tokens; equal at first, and heavy enough to outweigh the first results.
        self._average_accepted = self._average_expected = self._expected_drafts[self.sizes[-1]]

    @property
    def correction(self) -> float:
        """The factor on E(n) - 1."""
        low, high = self.CORRECTION_RANGE
        if self._average_expected <= 0.0:
            return 1.0
        return min(max(self._average_accepted / self._average_expected, low), high)

    def choose(self, num_lanes: int, *, num_plain_lanes: int = 0, num_prefill_rows: int = 0) -> int:
        best_size, best_rate = 1, 0.0
        for size in allowed_sizes(self.sizes, num_lanes, self._max_step_rows - num_plain_lanes):
            rate = self._tokens_per_second(size, num_lanes, num_plain_lanes, num_prefill_rows)
            if rate > best_rate * self.MIN_GAIN:
                best_size, best_rate = size, rate
        if best_size == 1:
            self._average_accepted += self.DRIFT_PER_PLAIN_STEP * (self._average_expected - self._average_accepted)
        self.chosen = best_size
        return best_size

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        # A device that offered fewer nodes than planned counts as the size below.
        size = self.sizes[bisect.bisect_right(self.sizes, num_nodes) - 1]
        weight = self.OBSERVATION_WEIGHT
        self._average_accepted += weight * (num_accepted - self._average_accepted)
        self._average_expected += weight * (self._expected_drafts[size] - self._average_expected)

    def _tokens_per_second(self, size: int, num_lanes: int, num_plain_lanes: int, num_prefill_rows: int) -> float:
        num_rows = num_lanes * size + num_plain_lanes + num_prefill_rows
        seconds = self._costs.forward.seconds(num_rows)
        if size > 1:
            seconds += self._costs.draft.seconds(num_lanes)
        num_tokens = num_lanes * (1.0 + self.correction * self._expected_drafts[size]) + num_plain_lanes
        return num_tokens / max(seconds, 1e-9)
