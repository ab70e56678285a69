"""Steps whose results have not come back."""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_core.plan import PrefillChunk
from medusa_core.request import Request
from medusa_core.scheduler.costs import DecodeGroups


@dataclass(slots=True)
class InFlightStep:
    """What a launched step will report.

    requests: by uid, every request with rows in the step. chunks: its prefill, by request. groups: its decode part.
    max_drawn: by uid, the most tokens its result can hold; requests in the middle of their prefill are not here.
    masked: the same for decoding requests with a grammar, whose results may come later; they are in neither of the others.
    """

    requests: dict[int, Request] = field(default_factory=dict)
    chunks: list[tuple[Request, PrefillChunk]] = field(default_factory=list)
    max_drawn: dict[int, int] = field(default_factory=dict)
    masked: dict[int, tuple[Request, int]] = field(default_factory=dict)
    groups: DecodeGroups = ()

    def add_chunk(self, request: Request, chunk: PrefillChunk) -> None:
        self.chunks.append((request, chunk))
        if chunk.is_last:
            self.add_draw(request, 1)
        else:
            self.requests[request.uid] = request
            request.num_steps_in_flight += 1

    def add_draw(self, request: Request, max_tokens: int, *, is_masked: bool = False) -> None:
        if is_masked:
            self.masked[request.uid] = request, max_tokens
        else:
            self.requests[request.uid] = request
            self.max_drawn[request.uid] = max_tokens
        request.num_steps_in_flight += 1
        request.num_draws_in_flight += 1
        request.max_tokens_in_flight += max_tokens


class InFlightSteps:
    """Launched steps by id. What they may still bring is counted in each request."""

    def __init__(self) -> None:
        self._steps: dict[int, InFlightStep] = {}
        self._masked: dict[int, tuple[Request, int]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_masked(self) -> bool:
        """Whether decoding requests with a grammar are in flight."""
        return bool(self._masked)

    def launch(self, step_id: int, step: InFlightStep) -> None:
        self._steps[step_id] = step
        self._masked |= step.masked

    def land_masked(self, uid: int) -> Request:
        """Take out a decoding request with a grammar. Raises KeyError for one not in flight."""
        request, max_tokens = self._masked.pop(uid)
        request.num_steps_in_flight -= 1
        request.num_draws_in_flight -= 1
        request.max_tokens_in_flight -= max_tokens
        return request

    def land(self, step_id: int) -> InFlightStep:
        """Take out the step whose result came back. Raises KeyError for a step not in flight."""
        step = self._steps.pop(step_id)
        for request in step.requests.values():
            request.num_steps_in_flight -= 1
        for uid, max_tokens in step.max_drawn.items():
            request = step.requests[uid]
            request.num_draws_in_flight -= 1
            request.max_tokens_in_flight -= max_tokens
        return step
