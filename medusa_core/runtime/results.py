"""From a lane's row of device results to what the scheduler is told."""

from __future__ import annotations

from medusa_core.outputs import FinishReason
from medusa_core.plan import LaneResult
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.verify import FINISHED_LENGTH, FINISHED_STOP

_FINISH_REASONS = {FINISHED_STOP: FinishReason.STOP, FINISHED_LENGTH: FinishReason.LENGTH}


def lane_result(
    lane: int, uid: int, tree: DeviceTree, token_ids: list[int], num_drawn: int, num_kept: int, finish_code: int
) -> LaneResult:
    """token_ids: the tokens drawn along the path, padded; `num_kept` of them were emitted."""
    return LaneResult(
        lane=lane,
        uid=uid,
        token_ids=token_ids[:num_kept],
        num_draft_nodes=tree.num_nodes - 1,
        draft_depth=tree.max_depth,
        num_accepted=min(num_kept, num_drawn - 1),
        finish_reason=_FINISH_REASONS.get(finish_code),
    )
