"""The one interface through which callers use an engine, whether it runs in this process or in another."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from medusa_core.outputs import EngineInfo, EngineStats, TokenDelta
from medusa_core.request import EngineRequest


class EngineClient(Protocol):
    """An engine as its callers see it. One event loop; not thread-safe."""

    async def start(self) -> EngineInfo:
        """Load the model and return when requests can be served. Raises ConfigError, ModelError or EngineError."""
        ...

    async def close(self) -> None:
        """Stop the engine; live requests end with EngineDeadError."""
        ...

    @property
    def info(self) -> EngineInfo:
        """Raises EngineNotReadyError before the first successful start."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot: at most one step old, where no other client uses the engine too."""
        ...

    @property
    def num_open_requests(self) -> int:
        """Requests of this client whose end the engine has not told yet, whether or not somebody still reads them."""
        ...

    @property
    def is_ready(self) -> bool:
        """True while requests can be served: loaded, process alive, not restarting."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        """Deltas of all n choices, interleaved, until each has a finish reason.

        Closing the iterator (or cancelling the task that reads it) aborts what still runs. Raises RequestError or CapacityError
        before the first delta, EngineDeadError at any point.
        """
        ...

    def generate_many(self, requests: Sequence[EngineRequest]) -> AsyncGenerator[list[TokenDelta], None]:
        """Deltas of several requests, until each choice has a finish reason.

        Each item is all that has arrived since the one before, in order and never empty: a caller that is behind gets fewer and
        longer ones. The first request that fails ends the rest. Otherwise as `generate`.
        """
        ...

    async def abort(self, request_id: str, choice_idx: int | None = None) -> None:
        """End one choice, or all. Each open choice gets a last delta with FinishReason.ABORT; unknown ids are ignored."""
        ...
