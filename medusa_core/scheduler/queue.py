"""Choices that wait for a lane, best first."""

from __future__ import annotations

import heapq

from medusa_core.request import Request

Rank = tuple[int, int]


def rank(request: Request) -> Rank:
    """The one order of requests, lower is better: priority, then arrival (uids count up).

    Admission takes the best and preemption the worst, so the best request always makes progress. A preempted request keeps its
    uid and so comes back at the front of its priority.
    """
    return (request.priority, request.uid)


class WaitingQueue:
    """A heap. `hold` keeps a choice in the queue, counted but out of turn, until `release`."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Request]] = []
        # Entries of the heap count only while their uid is here: a removal from the middle costs nothing.
        self._ready: set[int] = set()
        self._held: set[int] = set()

    def __len__(self) -> int:
        """Waiting choices, held ones included."""
        return len(self._ready) + len(self._held)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (rank(request), request))
        self._ready.add(request.uid)

    def hold(self, request: Request) -> None:
        self._held.add(request.uid)

    def is_held(self, request: Request) -> bool:
        return request.uid in self._held

    def release(self, request: Request) -> None:
        """Let a held choice take its turn; no effect on others."""
        if self.is_held(request):
            self._held.remove(request.uid)
            self.push(request)

    def remove(self, request: Request) -> None:
        """Drop a choice for good, if it is here."""
        self._ready.discard(request.uid)
        self._held.discard(request.uid)

    def peek(self) -> Request | None:
        """The best choice that is not held."""
        while self._heap and self._heap[0][1].uid not in self._ready:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take the choice that `peek` shows. Raises IndexError when there is none."""
        self.peek()
        _, request = heapq.heappop(self._heap)
        self._ready.remove(request.uid)
        return request
