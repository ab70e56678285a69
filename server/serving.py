"""What the routes of one app share: the engine client, the loaded model, and whether requests are taken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry

from medusa_core.engine.client import EngineClient
from medusa_core.engine.logs import adopt_library_logs
from medusa_core.errors import DrainingError, EngineNotReadyError
from medusa_core.outputs import EngineInfo
from medusa_core.text import TextProcessor, import_tokenizers
from medusa_core.text.tool_formats import find_tool_format
from server.limits import InMemoryLimiter, RateLimiter
from server.metrics import EngineMetrics, GenerationMetrics, HttpMetrics, register_build_info, render
from server.served_model import ServedModel, served_names
from server.settings import ServerSettings

if TYPE_CHECKING:
    from server.tracing import RequestTracer

logger = logging.getLogger(__name__)

TextLoader = Callable[[EngineInfo], TextProcessor]


def text_loader(settings: ServerSettings) -> TextLoader:
    """Loads tokenizer and chat template from the folder that the engine names.

    Its libraries are imported in a thread meanwhile, as the engine's process takes longer to load the model.
    """
    importing = threading.Thread(target=_import_tokenizers, name="import-tokenizers", daemon=True)
    importing.start()

    def load(info: EngineInfo) -> TextProcessor:
        # Where the engine is there already it is known at once, and a second thread that imports transformers finds it half made.
        importing.join()
        return TextProcessor.load(
            info.tokenizer_path, chat_template=settings.chat_template, trust_remote_code=settings.trust_remote_code
        )

    return load


def _import_tokenizers() -> None:
    # What goes wrong here is told when the text is loaded.
    with contextlib.suppress(ImportError):
        import_tokenizers()
        adopt_library_logs()


class Siblings(Protocol):
    """The front ends before one engine, as one of them sees them.

    created: Unix time that all of them tell as the model's. is_late: the others answer already, so this one takes connections only
    once it has loaded. limiter: counts what all of them admit.
    """

    created: int
    is_late: bool

    @property
    def limiter(self) -> RateLimiter: ...

    async def all_loaded(self) -> None:
        """Say that this one has loaded, and return when all have."""
        ...

    async def metrics_page(self) -> bytes:
        """What /metrics says of all of them."""
        ...


@dataclass(eq=False)
class Serving:
    """The state of one app. `load` runs once, in the background, while the server already answers health checks."""

    client: EngineClient
    load_text: TextLoader
    settings: ServerSettings
    # None: this is the only front end
    siblings: Siblings | None = None
    # what this front end counts itself, and what the engine tells all of them
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    engine_registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    model: ServedModel | None = None
    # until the first load has ended, well or not
    is_loading: bool = True
    is_draining: bool = False
    # HTTP requests being answered now; the drain waits for 0
    num_active: int = 0
    tracer: RequestTracer | None = None

    def __post_init__(self) -> None:
        self.keyring = self.settings.keyring()
        self.limiter = InMemoryLimiter() if self.siblings is None else self.siblings.limiter
        self.http_metrics = HttpMetrics(self.registry)
        register_build_info(self.engine_registry)
        # Long prompts stall neither running streams nor, up to this many of them, the prompts that come after.
        self.text_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="text")

    async def load(self) -> None:
        """Start the engine and load its tokenizer. Raises what `EngineClient.start` and the text loader raise."""
        try:
            info = await self.client.start()
            text = await asyncio.get_running_loop().run_in_executor(self.text_threads, self.load_text, info)
            if self.siblings is not None:
                await self.siblings.all_loaded()
        finally:
            self.is_loading = False
        names = served_names(self.settings, info)
        metrics = GenerationMetrics(
            self.registry,
            model_name=names[0],
            max_depth=info.max_depth,
            max_model_len=info.max_model_len,
            num_open_requests=lambda: self.client.num_open_requests,
        )
        engine_metrics = EngineMetrics(self.engine_registry, model_name=names[0], info=info)
        tool_format = find_tool_format(self.settings.tool_call_parser, text.chat_template_text)
        created = int(time.time()) if self.siblings is None else self.siblings.created
        self.model = ServedModel(info, text, metrics, engine_metrics, names, created=created, tool_format=tool_format)
        logger.info("Ready: %s (%s on %s, context %d)", names[0], info.dtype, info.device, info.max_model_len)

    async def metrics_page(self) -> bytes:
        """What /metrics says: of HTTP from the start, of the engine once the model is loaded. Of all front ends."""
        if self.siblings is not None:
            return await self.siblings.metrics_page()
        if self.model is not None:
            self.model.engine_metrics.update(self.client.stats if self.client.is_ready else None)
        has_vllm_names = not self.settings.no_vllm_metrics
        return render(self.registry.collect(), self.engine_registry.collect(), has_vllm_names=has_vllm_names)

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
