"""How many nodes each lane's tree gets this step, the root included; 1 is plain decoding."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Protocol

from medusa_core.config import NODE_BUCKETS
from medusa_core.errors import ConfigError
from medusa_core.scheduler.costs import StepCosts

_MAX_REMEMBERED_COSTS = 4096


class TreeSizeController(Protocol):
    """Chooses a tree size per step.

    sizes: every size it may choose, increasing, from 1. chosen: the latest choice. costs: what it chooses by, None if not by costs.
    """

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def chosen(self) -> int: ...

    @property
    def costs(self) -> StepCosts | None: ...

    def choose(self, num_lanes: int, *, num_plain_lanes: int = 0, num_prefill_rows: int = 0) -> int:
        """Nodes for each of `num_lanes` drafting lanes, in a step that also has lanes of one row and prefill rows."""
        ...

    def force(self, size: int | None) -> None:
        """Choose `size`, or the largest below it that the row budget allows, until told otherwise; None gives the choice back.

        Raises ConfigError for a size that is not one of `sizes`.
        """
        ...

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """One lane's result: draft tokens accepted from a tree of `num_nodes` nodes."""
        ...


def tree_sizes(max_nodes: int) -> tuple[int, ...]:
    """The padded sizes below `max_nodes`, then `max_nodes` itself."""
    return (*(size for size in NODE_BUCKETS if size < max_nodes), max_nodes)


class _SizeLimits:
    """The sizes there are, and what bounds the choice: the row budget, and a size asked for at run time."""

    def __init__(self, sizes: tuple[int, ...], *, max_step_rows: int) -> None:
        self.sizes = sizes
        self.chosen = 1
        self._max_step_rows = max_step_rows
        self._forced: int | None = None

    def force(self, size: int | None) -> None:
        """As TreeSizeController.force."""
        if size is not None and size not in self.sizes:
            sizes = ", ".join(map(str, self.sizes))
            raise ConfigError(f"This engine has no tree of {size} nodes.", hint=f'Its sizes are {sizes}; or "auto".')
        self._forced = size

    def _allowed(self, num_lanes: int, num_plain_lanes: int) -> tuple[int, ...]:
        """Sizes up to the forced one whose rows fit; plain decoding always does (max_step_rows >= max_num_seqs)."""
        max_rows = self._max_step_rows - num_plain_lanes
        limit = self.sizes[-1] if self._forced is None else self._forced
        return tuple(size for size in self.sizes if size == 1 or (size <= limit and num_lanes * size <= max_rows))


class FixedTreeSize(_SizeLimits):
    """The size asked for, or the largest padded size below it that the row budget allows."""

    def __init__(self, num_nodes: int, *, max_step_rows: int) -> None:
        super().__init__(tree_sizes(num_nodes), max_step_rows=max_step_rows)
        self.costs = None

    def choose(self, num_lanes: int, *, num_plain_lanes: int = 0, num_prefill_rows: int = 0) -> int:
        self.chosen = self._allowed(num_lanes, num_plain_lanes)[-1]
        return self.chosen

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """A fixed size learns nothing."""


class MeasuredTreeSize(_SizeLimits):
    """The size with the most tokens per second of decoding: (lanes * E(n) + plain lanes) / t(n).

    Prompts have to be computed whatever the size, and the lanes they will fill decode cheaply beside many others. So t(n) is what
    decoding takes alone, plain, and what the tree adds to this step, prefill rows included. Over the whole step, beside a chunk
    that takes longer than they do, trees would look nearly free that make all requests together slower.

    E(n) - 1, the draft tokens expected per step, comes from calibration and is corrected by live acceptance: one factor, a ratio of
    two moving averages. The source of the rule is Sequoia's hardware-aware tree choice, with a constant draft cost.

    expected_tokens: E(n) for each size, 1.0 for size 1.
    """

    # A larger tree must win by this much: rows measured at start-up are noisy, and fewer rows leave room for other requests.
    MIN_GAIN = 1.03
    # Any tree at all must win by more: it also costs the host some time, which is not measured.
    MIN_GAIN_OVER_PLAIN = 1.05
    CORRECTION_RANGE = (0.0, 2.0)
    # Weight of one lane's result: the average covers about the last 200.
    OBSERVATION_WEIGHT = 0.005
    # While steps are plain nothing is learnt about drafts, so the correction drifts back to 1 and speculation is tried again.
    # So slowly that heads that are never right cost 1 or 2 % of the time.
    DRIFT_PER_PLAIN_STEP = 0.0001

    def __init__(self, expected_tokens: Mapping[int, float], costs: StepCosts, *, max_step_rows: int) -> None:
        super().__init__(tuple(sorted({1, *expected_tokens})), max_step_rows=max_step_rows)
        self._expected_drafts = {size: expected_tokens[size] - 1.0 if size > 1 else 0.0 for size in self.sizes}
        self.costs: StepCosts = costs
        # Asked for every size in every step, about loads that seldom change from one step to the next.
        self._decode_seconds = lru_cache(_MAX_REMEMBERED_COSTS)(self._measured_decode_seconds)
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
        sizes = self._allowed(num_lanes, num_plain_lanes)
        if self._forced is not None:
            self.chosen = sizes[-1]
            return self.chosen
        best_size, best_rate = 1, 0.0
        correction = self.correction
        for size in sizes:
            num_tokens = num_lanes * (1.0 + correction * self._expected_drafts[size]) + num_plain_lanes
            rate = num_tokens / self._decode_seconds(size, num_lanes, num_plain_lanes, num_prefill_rows)
            if rate > best_rate * (self.MIN_GAIN_OVER_PLAIN if best_size == 1 else self.MIN_GAIN):
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

    def _measured_decode_seconds(self, size: int, num_lanes: int, num_plain_lanes: int, num_prefill_rows: int) -> float:
        """t(n): of a step that only decodes, plain, and what the tree adds to the step there is."""
        seconds = partial(self.costs.seconds, num_lanes=num_lanes, num_plain_lanes=num_plain_lanes)
        added_s = seconds(size, num_prefill_rows=num_prefill_rows) - seconds(1, num_prefill_rows=num_prefill_rows)
        # Measured points may fall by chance; more rows are never cheaper.
        return max(seconds(1, num_prefill_rows=0) + max(added_s, 0.0), 1e-9)
