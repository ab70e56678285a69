"""What /metrics says where there are several front ends: their counts summed, and the engine's own once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from medusa_core.engine.worker_client import WorkerClient
from medusa_core.outputs import EngineInfo, EngineStats
from server.front_ends.messages import Family, Snapshot
from server.front_ends.totals import add_up, metrics_of
from server.metrics import EngineMetrics, register_build_info, render
from server.served_model import served_names
from server.settings import ServerSettings

# A front end that takes longer to tell its counts is shown with those it told last; an engine in a long step likewise.
COLLECT_TIMEOUT_S = 0.5


@dataclass(eq=False)
class _Collection:
    """Front ends that have been asked, those that have answered, and whether all have."""

    waiting: set[str]
    answered: set[str] = field(default_factory=set)
    is_complete: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, name: str, *, has_answered: bool) -> None:
        if name in self.waiting:
            self.waiting.discard(name)
            if has_answered:
                self.answered.add(name)
        if not self.waiting:
            self.is_complete.set()


class MetricsPage:
    """Belongs to the main process.

    collect: asks all front ends for a Snapshot with the id given, and returns their names.
    """

    def __init__(self, client: WorkerClient, settings: ServerSettings, collect: Callable[[int], set[str]]) -> None:
        self._client = client
        self._settings = settings
        self._collect = collect
        self._ids = itertools.count()
        self._collections: dict[int, _Collection] = {}
        self._counts: dict[str, list[Family]] = {}
        # summed over front ends that have gone
        self._gone: list[Family] = []
        self._engine_registry = CollectorRegistry()
        register_build_info(self._engine_registry)
        self._engine_metrics: EngineMetrics | None = None

    def receive(self, name: str, snapshot: Snapshot) -> None:
        """Take over what a front end has counted so far."""
        self._counts[name] = snapshot.families
        if snapshot.collection_id in self._collections:
            self._collections[snapshot.collection_id].settle(name, has_answered=True)

    def forget(self, name: str) -> None:
        """A front end has gone; what it counted stays."""
        self._gone = add_up([], [self._gone, self._counts.pop(name, [])])
        for collection in self._collections.values():
            collection.settle(name, has_answered=False)

    def on_engine_up(self, info: EngineInfo) -> None:
        """From now on the page tells of the engine."""
        if self._engine_metrics is None:
            model_name = served_names(self._settings, info)[0]
            self._engine_metrics = EngineMetrics(
                self._engine_registry, model_name=model_name, info=info, num_front_ends=self._settings.api_workers
            )

    def on_engine_down(self) -> None:
        """The page tells so until it is up again."""
        self._update(None)

    async def render(self) -> bytes:
        """The page, within COLLECT_TIMEOUT_S or soon after."""
        answered, _ = await asyncio.gather(self._ask_front_ends(), self._update_engine())
        live = [families for name, families in self._counts.items() if name in answered]
        silent = [families for name, families in self._counts.items() if name not in answered]
        families = add_up(live, [*silent, self._gone])
        has_vllm_names = not self._settings.no_vllm_metrics
        return render(metrics_of(families), self._engine_registry.collect(), has_vllm_names=has_vllm_names)

    async def _ask_front_ends(self) -> set[str]:
        """Names of those that have told their counts."""
        collection_id = next(self._ids)
        collection = self._collections[collection_id] = _Collection(self._collect(collection_id))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COLLECT_TIMEOUT_S):
                    if collection.waiting:
                        await collection.is_complete.wait()
        finally:
            del self._collections[collection_id]
        return collection.answered

    async def _update_engine(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COLLECT_TIMEOUT_S):
                await self._client.refresh()
        if self._client.is_ready:
            self._update(self._client.stats)

    def _update(self, stats: EngineStats | None) -> None:
        if self._engine_metrics is not None:
            self._engine_metrics.update(stats)
