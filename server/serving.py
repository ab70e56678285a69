"""What the routes of one app share: the engine client, the loaded model, and whether requests are taken."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from medusa_core.engine.client import EngineClient
from medusa_core.errors import DrainingError, EngineNotReadyError
from medusa_core.outputs import EngineInfo
from medusa_core.text import TextProcessor
from medusa_core.text.tool_formats import ToolFormat, find_tool_format
from server.errors import ModelNotFoundError
from server.limits import InMemoryLimiter, RateLimiter
from server.metrics import EngineMetrics, GenerationMetrics, HttpMetrics, register_build_info
from server.settings import ServerSettings

if TYPE_CHECKING:
    from server.tracing import RequestTracer

logger = logging.getLogger(__name__)

TextLoader = Callable[[EngineInfo], TextProcessor]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that has been loaded once; it stays known while its worker restarts.

    names: ids under which clients may ask for it. created: Unix time of loading, for `/v1/models`. tool_format: how it writes tool
    calls, None if it writes none or they are not looked for.
    """

    info: EngineInfo
    text: TextProcessor
    metrics: GenerationMetrics
    engine_metrics: EngineMetrics
    names: tuple[str, ...]
    created: int
    tool_format: ToolFormat | None = None

    def check_name(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names)
            raise ModelNotFoundError(f"The model {name[:200]!r} does not exist.", param="model", hint=f"Served here: {known}.")


@dataclass(eq=False)
class Serving:
    """The state of one app. `load` runs once, in the background, while the server already answers health checks."""

    client: EngineClient
    load_text: TextLoader
    settings: ServerSettings
    # what this front end counts itself, and what the engine tells all of them
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    engine_registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    model: ServedModel | None = None
    # until the first load has ended, well or not
    is_loading: bool = True
    is_draining: bool = False
    # HTTP requests being answered now; the drain waits for 0
    num_active: int = 0
    limiter: RateLimiter = field(default_factory=InMemoryLimiter)
    tracer: RequestTracer | None = None

    def __post_init__(self) -> None:
        self.keyring = self.settings.keyring()
        self.http_metrics = HttpMetrics(self.registry)
        register_build_info(self.engine_registry)
        # Long prompts stall neither running streams nor, up to this many of them, the prompts that come after.
        self.text_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="text")

    async def load(self) -> None:
        """Start the engine and load its tokenizer. Raises what `EngineClient.start` and the text loader raise."""
        try:
            info = await self.client.start()
            text = await asyncio.get_running_loop().run_in_executor(self.text_threads, self.load_text, info)
        finally:
            self.is_loading = False
        names = tuple(self.settings.served_model_name) or (info.model_name,)
        metrics = GenerationMetrics(self.registry, model_name=names[0], max_depth=info.max_depth, max_model_len=info.max_model_len)
        engine_metrics = EngineMetrics(self.engine_registry, model_name=names[0], info=info)
        tool_format = find_tool_format(self.settings.tool_call_parser, text.chat_template_text)
        self.model = ServedModel(info, text, metrics, engine_metrics, names, created=int(time.time()), tool_format=tool_format)
        logger.info("Ready: %s (%s on %s, context %d)", names[0], info.dtype, info.device, info.max_model_len)

    async def close(self) -> None:
        self.text_threads.shutdown(wait=False, cancel_futures=True)
        await self.client.close()
        if self.tracer is not None:
            await self.tracer.close()

    @property
    def is_healthy(self) -> bool:
        """False once the worker is dead or the first load has failed; a first load in progress is healthy."""
        return self.is_loading or (self.model is not None and self.client.is_ready)

    @property
    def is_ready(self) -> bool:
        return self.model is not None and self.client.is_ready and not self.is_draining

    def loaded_model(self) -> ServedModel:
        """The model, whether or not its engine takes requests. Raises EngineNotReadyError before it was loaded once."""
        if self.model is None:
            raise EngineNotReadyError("The model is still loading.", hint="Try again when /ready answers 200.")
        return self.model

    def require_model(self) -> ServedModel:
        """The model, for a route that is about to use the engine. Raises DrainingError or EngineNotReadyError."""
        if self.is_draining:
            raise DrainingError("The server is shutting down.", hint="Send the request to another instance, or try again later.")
        model = self.loaded_model()
        if not self.client.is_ready:
            raise EngineNotReadyError("The engine is restarting.", hint="Try again when /ready answers 200.")
        return model
