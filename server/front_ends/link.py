"""A front end's line to the main process."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

from medusa_core.engine.peer_client import PeerClient
from medusa_core.engine.sockets import Dealer
from medusa_core.errors import EngineDeadError, EngineError
from server.front_ends.messages import (
    Admitted,
    Collect,
    Family,
    FromFrontEnd,
    FrontEndSpec,
    Hello,
    Loaded,
    Page,
    Scrape,
    Snapshot,
    State,
    ToFrontEnd,
)
from server.front_ends.shared_limits import RemoteLimiter

logger = logging.getLogger(__name__)

# How often a front end tells its counts unasked, so that little is lost when it is killed.
SNAPSHOT_INTERVAL_S = 1.0
# The main process answers much sooner.
ANSWER_TIMEOUT_S = 5.0
# How long the last message may take to leave.
_LINGER_MS = 1_000


class Link:
    """Keeps `client` connected to the engine there is, and is what the app knows of the other front ends (serving.Siblings).

    It is made on the event loop, and says nothing by itself before `join`.
    """

    def __init__(self, spec: FrontEndSpec, client: PeerClient) -> None:
        self.created = spec.created
        self.is_late = spec.is_late
        self.limiter = RemoteLimiter(self)
        self._client = client
        self._is_open = asyncio.Event()
        self._engine_address: str | None = None
        self._ids = itertools.count()
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._reporting: asyncio.Task[None] | None = None
        self._dealer = Dealer(spec.address, ToFrontEnd, name=spec.name, on_message=self._receive, on_failure=self._on_failure)

    def join(self, *, count: Callable[[], list[Family]], on_drain: Callable[[], None], on_stop: Callable[[], None]) -> None:
        """Become one of the front ends.

        count: what this one has counted so far. on_drain, on_stop: called when the main process wants it, maybe repeatedly.
        """
        self._count = count
        self._on_drain = on_drain
        self._on_stop = on_stop
        self.send(Hello())
        self._reporting = asyncio.create_task(self._report(), name="report-counts")

    def close(self) -> None:
        """Waits for the last message to leave."""
        if self._reporting is not None:
            self._reporting.cancel()
        self._dealer.close(linger_ms=_LINGER_MS)

    def send(self, message: FromFrontEnd) -> None:
        self._dealer.send(message)

    async def ask(self, make_question: Callable[[int], FromFrontEnd]) -> Any:
        """The answer to a question, which is made with an id. Raises EngineError if there is none."""
        question_id = next(self._ids)
        answer = self._questions[question_id] = asyncio.get_running_loop().create_future()
        self.send(make_question(question_id))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError as error:
            raise EngineError("The main process does not answer.", hint="Try again.") from error
        finally:
            del self._questions[question_id]

    async def all_loaded(self) -> None:
        """As Siblings.all_loaded."""
        self.send(Loaded())
        await self._is_open.wait()

    async def metrics_page(self) -> bytes:
        """As Siblings.metrics_page. Raises EngineError if the main process does not answer."""
        page: bytes = await self.ask(Scrape)
        return page

    def _receive(self, message: ToFrontEnd) -> None:
        match message:
            case State():
                self._apply(message)
            case Collect():
                self.send(Snapshot(message.collection_id, self._count()))
            case Page():
                self._answer(message.scrape_id, message.page)
            case Admitted():
                if not self._answer(message.question.acquire_id, message.allowance):
                    self.limiter.give_back(message)

    def _answer(self, question_id: int, answer: Any) -> bool:
        """Whether somebody waits for it."""
        question = self._questions.get(question_id)
        if question is None or question.done():
            return False
        question.set_result(answer)
        return True

    def _apply(self, state: State) -> None:
        if state.info is not None:
            self._client.learn(state.info)
        if state.address != self._engine_address:
            self._engine_address = state.address
            error = state.error.rebuild() if state.error is not None else EngineDeadError("The engine was restarted.")
            self._client.disconnect(error)
            if state.address is not None:
                self._client.connect(state.address, state.stats)
        if state.is_open:
            self._is_open.set()
        if state.is_draining:
            self._on_drain()
        if state.is_stopping:
            self._on_stop()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_INTERVAL_S)
            self.send(Snapshot(None, self._count()))

    def _on_failure(self, error: BaseException) -> None:
        """Deaf to the main process, a front end would tell clients what is no longer true."""
        logger.critical("the line to the main process failed", exc_info=error)
        self._on_stop()
