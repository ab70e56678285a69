"""Lanes: which request runs on which row of device state, and how far its known tokens must be computed before it decodes."""

from __future__ import annotations

import bisect
import heapq

from medusa_core.request import Request, RequestStatus
from medusa_core.scheduler.queue import rank


def lane_of(request: Request) -> int:
    """The lane of a request that has one."""
    assert request.lane is not None
    return request.lane


class LaneTable:
    """The running requests. Lane changes are collected for the next plan."""

    def __init__(self, num_lanes: int) -> None:
        # A heap, so that the lanes in use stay low numbers.
        self._free = list(range(num_lanes))
        self._running: dict[int, Request] = {}
        self._prefill_targets: dict[int, int] = {}
        # Kept in order: it changes far less often than it is read.
        self._decoding: list[Request] = []
        self._leaves: list[int] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def has_leaves(self) -> bool:
        return bool(self._leaves)

    def join(self, request: Request) -> int:
        """Give the request a lane, which must be free. All tokens it knows now are to be computed before it decodes."""
        request.lane = heapq.heappop(self._free)
        request.status = RequestStatus.RUNNING
        self._running[request.uid] = request
        self._prefill_targets[request.uid] = request.num_known_tokens
        return request.lane

    def leave(self, request: Request) -> None:
        """Take the lane back. It can be given away at once: a plan's leaves come before its joins."""
        assert request.lane is not None
        del self._running[request.uid]
        if self._prefill_targets.pop(request.uid, None) is None:
            self._decoding.remove(request)
        self._leaves.append(request.lane)
        heapq.heappush(self._free, request.lane)
        request.lane = None

    def take_leaves(self) -> list[int]:
        """Lanes left since the last call."""
        leaves, self._leaves = self._leaves, []
        return leaves

    def prefill_target(self, request: Request) -> int:
        return self._prefill_targets[request.uid]

    def end_prefill(self, request: Request) -> None:
        """The last chunk is planned: from the next step on the request decodes."""
        del self._prefill_targets[request.uid]
        bisect.insort(self._decoding, request, key=rank)

    def prefilling(self) -> list[Request]:
        """Requests with chunks to plan, best first."""
        return sorted((self._running[uid] for uid in self._prefill_targets), key=rank)

    def decoding(self) -> list[Request]:
        """Requests whose known tokens are all computed or planned, best first. The caller must not change the list."""
        return self._decoding

    def worst(self) -> Request:
        """The request to preempt first. Raises ValueError when none runs."""
        return max(self._running.values(), key=rank)
