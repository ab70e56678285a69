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
    has_masked: whether that has lanes with a grammar.
    max_drawn: by uid, the most tokens its result can hold; requests in the middle of their prefill are not here.
    """

    requests: dict[int, Request] = field(default_factory=dict)
    chunks: list[tuple[Request, PrefillChunk]] = field(default_factory=list)
    max_drawn: dict[int, int] = field(default_factory=dict)
    groups: DecodeGroups = ()
    has_masked: bool = False

    def add_chunk(self, request: Request, chunk: PrefillChunk) -> None:
        self.chunks.append((request, chunk))
        if chunk.is_last:
            self.add_draw(request, 1)
        else:
            self.requests[request.uid] = request
            request.num_steps_in_flight += 1

    def add_draw(self, request: Request, max_tokens: int) -> None:
        self.requests[request.uid] = request
        self.max_drawn[request.uid] = max_tokens
        request.num_steps_in_flight += 1
        request.num_draws_in_flight += 1
        request.max_tokens_in_flight += max_tokens


class InFlightSteps:
    """Launched steps by id. What they may still bring is counted in each request."""

    def __init__(self) -> None:
        self._steps: dict[int, InFlightStep] = {}

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_masked(self) -> bool:
        return any(step.has_masked for step in self._steps.values())

    def launch(self, step_id: int, step: InFlightStep) -> None:
        self._steps[step_id] = step

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
