"""What a captured step leaves behind: results on their way to the host.

Shapes: B lanes of the step · R columns of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.grammar.lanes import GrammarLanes
from medusa_core.kernels.tree_step import NUM_RESULT_COLUMNS
from medusa_core.plan import LaneResult, StepResult
from medusa_core.runtime.lanes import HostLane
from medusa_core.runtime.logprobs import ChunkLogprobs, PathLogprobs
from medusa_core.runtime.results import lane_result
from medusa_core.speculation.device_tree import DeviceTree


@dataclass(slots=True)
class LaunchedGroup:
    """Lanes of one launch, and where their result rows arrive."""

    lanes: Sequence[int]
    hosts: list[HostLane]
    tree: DeviceTree
    result_BR: Tensor
    logprobs: PathLogprobs | None


class PendingGraphResult:
    """A launched step (plan.PendingStep).

    take_late: groups of earlier steps, or of this one, that have waited for masks and whose results have arrived by now.
    """

    def __init__(
        self,
        step_id: int,
        groups: list[LaunchedGroup],
        chunks: list[ChunkLogprobs],
        is_done: torch.cuda.Event | None,
        grammars: GrammarLanes,
        take_late: Callable[[PendingGraphResult], list[LaunchedGroup]],
    ) -> None:
        self._step_id = step_id
        self._grammars = grammars
        self._groups = groups
        self._chunks = chunks
        self._is_done = is_done
        self._take_late = take_late

    def result(self) -> StepResult:
        """Wait for the step's copies, not for what was launched behind it."""
        if self._is_done is not None:
            self._is_done.synchronize()
        groups = [*self._groups, *self._take_late(self)]
        return StepResult(
            step_id=self._step_id,
            lanes=[self._grammars.take(lane) for group in groups for lane in _read(group)],
            prompt_logprobs=[chunk.read() for chunk in self._chunks],
        )


def _read(group: LaunchedGroup) -> list[LaneResult]:
    tree, num_levels = group.tree, group.result_BR.shape[1] - NUM_RESULT_COLUMNS
    logprobs = group.logprobs.by_place() if group.logprobs is not None else {}
    rows = zip(group.lanes, group.hosts, group.result_BR.tolist(), strict=True)
    return [
        lane_result(lane, host, tree, logprobs.get(place, ()), row[:num_levels], *row[num_levels:])
        for place, (lane, host, row) in enumerate(rows)
    ]
