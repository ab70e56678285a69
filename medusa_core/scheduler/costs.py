"""What a step costs, as measured on this machine."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from medusa_core.errors import ConfigError


@dataclass(frozen=True)
class CostCurve:
    """Seconds by number of rows: linear between measured points, flat before the first, the last slope (never falling) after.

    points: (rows, seconds), rows increasing. Raises ConfigError when empty, out of order, or not positive.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ConfigError("A cost curve needs at least one measured point.")
        if any(second[0] <= first[0] for first, second in itertools.pairwise(self.points)):
            raise ConfigError(f"A cost curve's rows must increase, got {[rows for rows, _ in self.points]}.")
        if any(not seconds >= 0.0 for _, seconds in self.points):
            raise ConfigError("A cost curve's seconds must not be negative.")

    @classmethod
    def from_points(cls, points: Iterable[tuple[int, float]]) -> CostCurve:
        return cls(tuple(sorted(points)))

    def step_seconds(self, num_rows: int) -> float:
        """The measured point at or above `num_rows`: what a launch costs that is filled up to it. The last one beyond."""
        idx = bisect.bisect_left(self.points, num_rows, key=lambda point: point[0])
        return self.points[min(idx, len(self.points) - 1)][1]

    def seconds(self, num_rows: int) -> float:
        points = self.points
        if num_rows <= points[0][0] or len(points) == 1:
            return points[0][1]
        right = min(bisect.bisect_left(points, num_rows, key=lambda point: point[0]), len(points) - 1)
        (left_rows, left_s), (right_rows, right_s) = points[right - 1], points[right]
        slope = (right_s - left_s) / (right_rows - left_rows)
        if num_rows > right_rows:
            return right_s + max(slope, 0.0) * (num_rows - right_rows)
        return left_s + slope * (num_rows - left_rows)


# Nodes and number of lanes, of all lanes with as many nodes that decode in a step.
DecodeGroups: TypeAlias = tuple[tuple[int, int], ...]


class DecodeSeconds(NamedTuple):
    """What the decode part of a step takes, and the drafting in it."""

    step: float
    draft: float


class StepCosts(Protocol):
    """What the controller asks, and what steps are reckoned by afterwards."""

    def seconds(self, num_nodes: int, num_lanes: int, *, num_plain_lanes: int, num_prefill_rows: int) -> float:
        """Seconds of a step with `num_lanes` trees of `num_nodes` nodes, lanes of one row beside them, and prefill rows."""
        ...

    def decode_seconds(self, groups: DecodeGroups) -> DecodeSeconds:
        """Of a step that does nothing else."""
        ...


@dataclass(frozen=True)
class PackedCosts:
    """Of steps whose rows share one forward pass.

    forward: by all rows of the step. draft: what a tree adds to that (the heads, the walk, the commit), by lanes that draft.
    """

    forward: CostCurve
    draft: CostCurve

    def seconds(self, num_nodes: int, num_lanes: int, *, num_plain_lanes: int, num_prefill_rows: int) -> float:
        """See StepCosts."""
        seconds = self.forward.seconds(num_lanes * num_nodes + num_plain_lanes + num_prefill_rows)
        return seconds + self.draft.seconds(num_lanes) if num_nodes > 1 else seconds

    def decode_seconds(self, groups: DecodeGroups) -> DecodeSeconds:
        """See StepCosts. Drafting is all that a tree adds, the walk and the commit included."""
        num_drafting = sum(num_lanes for num_nodes, num_lanes in groups if num_nodes > 1)
        draft_s = self.draft.seconds(num_drafting) if num_drafting else 0.0
        return DecodeSeconds(self.forward.seconds(sum(nodes * lanes for nodes, lanes in groups)) + draft_s, draft_s)


class CapturedCosts:
    """Of captured steps: each group of lanes is a launch of its own, filled up to the next size there is; so are the prefill rows.

    decode: seconds by (lanes, nodes), and draft: the part of them that is drafting, measured at some. prefill: by rows. Raises
    ConfigError when decode or prefill is empty.
    """

    def __init__(
        self,
        decode: Mapping[tuple[int, int], float],
        prefill: Mapping[int, float],
        draft: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        self._decode = _curves(decode)
        self._draft = _curves(draft or {})
        self._prefill = CostCurve.from_points(prefill.items())

    def seconds(self, num_nodes: int, num_lanes: int, *, num_plain_lanes: int, num_prefill_rows: int) -> float:
        """See StepCosts."""
        seconds = self._decode[num_nodes].step_seconds(num_lanes)
        if num_plain_lanes:
            seconds += self._decode[1].step_seconds(num_plain_lanes)
        if num_prefill_rows:
            seconds += self._prefill.step_seconds(num_prefill_rows)
        return seconds

    def decode_seconds(self, groups: DecodeGroups) -> DecodeSeconds:
        """See StepCosts. Drafting is what heads and lookup take, up to the tokens of the tree."""
        return DecodeSeconds(
            sum(self._decode[nodes].step_seconds(lanes) for nodes, lanes in groups),
            sum(self._draft[nodes].seconds(lanes) for nodes, lanes in groups if nodes in self._draft),
        )


def _curves(seconds_at: Mapping[tuple[int, int], float]) -> dict[int, CostCurve]:
    """By nodes, of seconds by (lanes, nodes)."""
    return {
        num_nodes: CostCurve.from_points((lanes, seconds) for (lanes, nodes), seconds in seconds_at.items() if nodes == num_nodes)
        for num_nodes in {nodes for _, nodes in seconds_at}
    }
