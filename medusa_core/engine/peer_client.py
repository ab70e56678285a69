"""An engine that somebody else keeps alive: in a process of its own, told of by address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from medusa_core.engine.messages import Event
from medusa_core.engine.sockets import Dealer
from medusa_core.engine.streams import Streams
from medusa_core.errors import EngineDeadError, EngineNotReadyError, MedusaError
from medusa_core.outputs import EngineInfo, EngineStats, TokenDelta
from medusa_core.request import EngineRequest

logger = logging.getLogger(__name__)


class PeerClient:
    """An EngineClient that learns from its owner which engine there is (`learn`), where it is (`connect`) and when it has gone.

    Each engine gets a connection of its own, so nothing meant for a dead one reaches its successor.
    """

    def __init__(self) -> None:
        self._streams = Streams()
        self._info: EngineInfo | None = None
        self._is_known = asyncio.Event()
        self._connection: Dealer | None = None

    async def start(self) -> EngineInfo:
        """As EngineClient.start: waits until the engine is known."""
        await self._is_known.wait()
        return self.info

    async def close(self) -> None:
        """As EngineClient.close, for this client's requests."""
        self.disconnect(EngineDeadError("The engine was closed."))

    def learn(self, info: EngineInfo) -> None:
        """What is served, which may be known before the engine takes requests."""
        self._info = info
        self._is_known.set()

    def connect(self, address: str, stats: EngineStats) -> None:
        """Take requests for the engine at `address`, whose snapshot is `stats`, from now on."""
        self._connection = Dealer(address, Event, on_message=self._streams.receive, on_failure=self._on_failure)
        self._streams.attach(self._connection.send, stats)

    def disconnect(self, error: MedusaError) -> None:
        """The engine has gone: live requests end with `error`. Harmless without a connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._streams.detach(error)

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineNotReadyError("The engine has not loaded yet.", hint="Await start() first.")
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._streams.stats

    @property
    def num_open_requests(self) -> int:
        return self._streams.num_open

    @property
    def is_ready(self) -> bool:
        return self._streams.is_attached

    async def refresh(self) -> None:
        """Ask the engine for a snapshot, and return when `stats` is that or a later one, or when there is no engine to ask.

        Needed where other clients use the engine too: each is only told of the steps that run requests of its own.
        """
        await self._streams.refresh()

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        return self._streams.generate(request)

    def generate_many(self, requests: Sequence[EngineRequest]) -> AsyncGenerator[list[TokenDelta], None]:
        return self._streams.generate_many(requests)

    async def abort(self, request_id: str, choice_idx: int | None = None) -> None:
        self._streams.abort(request_id, choice_idx)

    def _on_failure(self, error: BaseException) -> None:
        """Without its reader a connection is useless: live requests end with an error instead of waiting for ever."""
        logger.critical("the connection to the engine process failed", exc_info=error)
        self._streams.detach(EngineDeadError("The connection to the engine process failed.", hint="Restart the server."))
