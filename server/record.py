"""What is told about one request in its answer: times, and what speculation did for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medusa_core.outputs import TokenDelta
from server.protocol.common import RequestMetrics, SpeculationMetrics


class RequestRecord:
    """Collects the steps of one choice. Counts are those of the server's metrics: after trimming.

    max_depth: longest path of the tree; 0 where nothing drafts.
    """

    def __init__(self, *, arrival_s: float, max_depth: int) -> None:
        self.arrival_s = arrival_s
        # of the first and the last token, as time.monotonic() tells it
        self.first_s = self.last_s = arrival_s
        self.queue_s = 0.0
        self.num_tokens = 0
        self.num_draft_tokens = 0
        self._histogram = [0] * (max_depth + 1)

    def add(self, delta: TokenDelta, *, num_kept: int, now_s: float) -> None:
        """A step, of which `num_kept` tokens are part of the answer."""
        if num_kept == 0:
            return
        if delta.is_first:
            self.first_s, self.queue_s = now_s, delta.queue_s
        self.last_s = now_s
        self.num_tokens += num_kept
        if delta.num_draft_nodes > 0:
            self.num_draft_tokens += delta.draft_depth
            self._histogram[min(delta.num_accepted, num_kept)] += 1

    @property
    def metrics(self) -> RequestMetrics:
        """Everything so far."""
        generation_s, total_s = self.last_s - self.first_s, self.last_s - self.arrival_s
        num_later = self.num_tokens - 1
        return RequestMetrics(
            time_to_first_token_ms=_ms(self.first_s - self.arrival_s),
            generation_time_ms=_ms(generation_s),
            queue_time_ms=_ms(self.queue_s),
            mean_itl_ms=_ms(generation_s / num_later) if num_later > 0 else None,
            tokens_per_second=round(self.num_tokens / total_s, 3) if total_s > 0 else None,
            speculative_decoding=self._speculation,
        )

    @property
    def num_drafts(self) -> int:
        """Steps with draft nodes."""
        return sum(self._histogram)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(length * count for length, count in enumerate(self._histogram))

    @property
    def _speculation(self) -> SpeculationMetrics | None:
        num_steps = self.num_drafts
        if num_steps == 0:
            return None
        num_accepted = self.num_accepted_tokens
        return SpeculationMetrics(
            mean_acceptance_length=round(1 + num_accepted / num_steps, 4),
            draft_acceptance_rate=round(num_accepted / self.num_draft_tokens, 4),
            acceptance_histogram=self._histogram,
            num_spec_steps=num_steps,
            num_accepted_draft_tokens=num_accepted,
            num_draft_tokens=self.num_draft_tokens,
            num_spec_tokens=len(self._histogram) - 1,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine did for one HTTP request, over all its choices.

    first_s, last_s: `time.monotonic()` of the first and the last token; queue_s: wait of the choice that came first. All None where
    no token came.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    first_s: float | None
    last_s: float | None
    queue_s: float | None

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> Work:
        begun = [record for record in records if record.num_tokens]
        first = min(begun, key=lambda record: record.first_s, default=None)
        return cls(
            num_drafts=sum(record.num_drafts for record in begun),
            num_draft_tokens=sum(record.num_draft_tokens for record in begun),
            num_accepted_tokens=sum(record.num_accepted_tokens for record in begun),
            first_s=None if first is None else first.first_s,
            last_s=max((record.last_s for record in begun), default=None),
            queue_s=None if first is None else first.queue_s,
        )

    @property
    def mean_acceptance_length(self) -> float | None:
        """Bonus included; None without a draft."""
        return round(1 + self.num_accepted_tokens / self.num_drafts, 4) if self.num_drafts else None


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
