"""Chunked prefill: how much of each prompt is computed in one step.

Decode lanes come first and have a budget of their own (`max_step_rows`), so a long prompt slows running requests by a bounded time
per step and never stops them.
"""

from __future__ import annotations

from medusa_core.plan import PrefillChunk
from medusa_core.request import Request


class PrefillBudget:
    """The prefill tokens of one step, handed out in the order asked."""

    def __init__(self, max_step_tokens: int) -> None:
        self.num_left = max_step_tokens

    def next_chunk(self, request: Request, target: int) -> PrefillChunk | None:
        """The next chunk of a request that has a lane, up to known token `target`; advances `num_computed_tokens`.

        None when the budget is spent.
        """
        assert request.lane is not None
        start = request.num_computed_tokens
        num_tokens = min(target - start, self.num_left)
        if num_tokens == 0:
            return None
        self.num_left -= num_tokens
        request.num_computed_tokens += num_tokens
        is_last = request.num_computed_tokens == target
        return PrefillChunk(lane=request.lane, start=start, num_tokens=num_tokens, is_last=is_last)
