"""What a step costs, as measured on this machine."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class StepCosts:
    """forward: one pass of the model, by all rows of the step. draft: what a tree adds to that (the heads, the walk, the commit),
    by lanes that draft."""

    forward: CostCurve
    draft: CostCurve
