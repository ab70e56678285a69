"""Limits per API key that hold over all front ends: the main process counts, and they ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from server.front_ends.messages import Acquire, Admitted, FromFrontEnd, Settle
from server.limits import Allowance, InMemoryLimiter, KeyLimits


class Line(Protocol):
    """A front end's line to the main process, as far as it is needed here."""

    def send(self, message: FromFrontEnd) -> None: ...

    def ask(self, make_question: Callable[[int], FromFrontEnd]) -> Awaitable[Allowance]:
        """The answer to a question, which is made with an id."""
        ...


class RemoteLimiter:
    """A RateLimiter that asks the main process."""

    def __init__(self, line: Line) -> None:
        self._line = line

    async def acquire(self, key_name: str, limits: KeyLimits) -> Allowance:
        return await self._line.ask(partial(Acquire, key_name=key_name, limits=limits))

    def settle(self, key_name: str, limits: KeyLimits, *, num_tokens: int) -> None:
        self._line.send(Settle(key_name, limits, num_tokens))

    def give_back(self, admitted: Admitted) -> None:
        """Nobody waits for this answer any more, so nothing will run."""
        if admitted.allowance.refused_for is None:
            self.settle(admitted.question.key_name, admitted.question.limits, num_tokens=0)


class SharedLimiter:
    """The main process's side. A front end that dies settles what it had not."""

    def __init__(self) -> None:
        self._limiter = InMemoryLimiter()
        self._unsettled: dict[str, Counter[tuple[str, KeyLimits]]] = {}

    async def acquire(self, front_end: str, question: Acquire) -> Admitted:
        allowance = await self._limiter.acquire(question.key_name, question.limits)
        if allowance.refused_for is None:
            self._unsettled.setdefault(front_end, Counter())[question.key_name, question.limits] += 1
        return Admitted(question, allowance)

    def settle(self, front_end: str, settle: Settle) -> None:
        self._limiter.settle(settle.key_name, settle.limits, num_tokens=settle.num_tokens)
        self._unsettled[front_end][settle.key_name, settle.limits] -= 1

    def forget(self, front_end: str) -> None:
        """It has gone. What its requests had used by then nobody knows, so no tokens are charged."""
        for key_name, limits in self._unsettled.pop(front_end, Counter()).elements():
            self._limiter.settle(key_name, limits, num_tokens=0)
