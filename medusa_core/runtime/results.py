"""From a lane's row of device results to what the scheduler is told."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_core.outputs import FinishReason, TokenLogprob
from medusa_core.plan import LaneResult
from medusa_core.runtime.lanes import HostLane
from medusa_core.runtime.logprobs import cut
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.verify import FINISHED_LENGTH, FINISHED_STOP

_FINISH_REASONS = {FINISHED_STOP: FinishReason.STOP, FINISHED_LENGTH: FinishReason.LENGTH}


def lane_result(
    lane: int,
    host: HostLane,
    tree: DeviceTree,
    logprobs: Sequence[TokenLogprob],
    token_ids: list[int],
    num_drawn: int,
    num_kept: int,
    finish_code: int,
    credit: int,
) -> LaneResult:
    """host: of the lane when the step was launched. token_ids: the tokens drawn along the path, padded; `num_kept` of them were
    emitted. credit: see speculation.verify.credited_nodes. logprobs: of those emitted, or empty."""
    return LaneResult(
        lane=lane,
        uid=host.uid,
        token_ids=token_ids[:num_kept],
        num_draft_nodes=tree.num_nodes - 1,
        draft_depth=tree.max_depth,
        num_accepted=min(num_kept, num_drawn - 1),
        finish_reason=_FINISH_REASONS.get(finish_code),
        credit=credit,
        logprobs=cut(logprobs, num_kept, host.params.num_logprobs),
    )
