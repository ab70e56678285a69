"""What is told about one request in its answer: times, and what speculation did for it."""

from __future__ import annotations

from medusa_core.outputs import TokenDelta
from server.protocol.common import RequestMetrics, SpeculationMetrics


class RequestRecord:
    """Collects the steps of a request of one choice. Counts are those of the server's metrics: after trimming.

    max_depth: longest path of the tree; 0 where nothing drafts.
    """

    def __init__(self, *, arrival_s: float, max_depth: int) -> None:
        self._arrival_s = arrival_s
        self._first_s = self._last_s = arrival_s
        self._queue_s = 0.0
        self._num_tokens = 0
        self._num_draft_tokens = 0
        self._histogram = [0] * (max_depth + 1)

    def add(self, delta: TokenDelta, *, num_kept: int, now_s: float) -> None:
        """A step, of which `num_kept` tokens are part of the answer."""
        if num_kept == 0:
            return
        if delta.is_first:
            self._first_s, self._queue_s = now_s, delta.queue_s
        self._last_s = now_s
        self._num_tokens += num_kept
        if delta.num_draft_nodes > 0:
            self._num_draft_tokens += delta.draft_depth
            self._histogram[min(delta.num_accepted, num_kept)] += 1

    @property
    def metrics(self) -> RequestMetrics:
        """Everything so far."""
        generation_s, total_s = self._last_s - self._first_s, self._last_s - self._arrival_s
        num_later = self._num_tokens - 1
        return RequestMetrics(
            time_to_first_token_ms=_ms(self._first_s - self._arrival_s),
            generation_time_ms=_ms(generation_s),
            queue_time_ms=_ms(self._queue_s),
            mean_itl_ms=_ms(generation_s / num_later) if num_later > 0 else None,
            tokens_per_second=round(self._num_tokens / total_s, 3) if total_s > 0 else None,
            speculative_decoding=self._speculation,
        )

    @property
    def _speculation(self) -> SpeculationMetrics | None:
        num_steps = sum(self._histogram)
        if num_steps == 0:
            return None
        num_accepted = sum(length * count for length, count in enumerate(self._histogram))
        return SpeculationMetrics(
            mean_acceptance_length=round(1 + num_accepted / num_steps, 4),
            draft_acceptance_rate=round(num_accepted / self._num_draft_tokens, 4),
            acceptance_histogram=self._histogram,
            num_spec_steps=num_steps,
            num_accepted_draft_tokens=num_accepted,
            num_draft_tokens=self._num_draft_tokens,
            num_spec_tokens=len(self._histogram) - 1,
        )


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
