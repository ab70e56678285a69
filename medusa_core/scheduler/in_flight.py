"""Steps whose results have not come back, and what is known about lengths until they do."""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_core.plan import PrefillChunk
from medusa_core.request import Request


@dataclass(slots=True)
class InFlightStep:
    """What a launched step will report.

    requests: by uid, every request with rows in the step. chunks: its prefill, by request.
    max_emitted: by uid, the most tokens its result can hold; requests in the middle of their prefill are not here.
    """

    requests: dict[int, Request] = field(default_factory=dict)
    chunks: list[tuple[Request, PrefillChunk]] = field(default_factory=list)
    max_emitted: dict[int, int] = field(default_factory=dict)

    def add_chunk(self, request: Request, chunk: PrefillChunk) -> None:
        self._add(request)
        self.chunks.append((request, chunk))
        if chunk.is_last:
            self.max_emitted[request.uid] = 1

    def add_decode(self, request: Request, max_emitted: int) -> None:
        self._add(request)
        self.max_emitted[request.uid] = max_emitted

    def _add(self, request: Request) -> None:
        self.requests[request.uid] = request
        request.num_steps_in_flight += 1


class InFlightSteps:
    """Launched steps by id."""

    def __init__(self) -> None:
        self._steps: dict[int, InFlightStep] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, step_id: int, step: InFlightStep) -> None:
        self._steps[step_id] = step

    def land(self, step_id: int) -> InFlightStep:
        """Take out the step whose result came back. Raises KeyError for a step not in flight."""
        step = self._steps.pop(step_id)
        for request in step.requests.values():
            request.num_steps_in_flight -= 1
        return step

    def max_known_tokens(self, request: Request) -> int:
        """Most tokens the request can know once every step in flight is done."""
        num_known = request.num_known_tokens
        num_known += sum(step.max_emitted.get(request.uid, 0) for step in self._steps.values())
        return min(num_known, request.max_total_tokens)

    def is_surely_finished(self, request: Request) -> bool:
        """True if the steps in flight end the request whatever they emit: each emits at least one token unless it finished."""
        num_emitting = sum(request.uid in step.max_emitted for step in self._steps.values())
        return request.num_known_tokens + num_emitting >= request.max_total_tokens
