"""The application: `create_app` puts routes, middleware and error answers around one engine client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from medusa_core import __version__
from medusa_core.engine.client import EngineClient
from medusa_core.errors import MedusaError
from server import openapi
from server.answers import error_response, http_error_response
from server.auth import OPEN_PATHS, APIKeyMiddleware, CrossSiteMiddleware
from server.errors import CLIENT_CLOSED_REQUEST
from server.limits import RATE_LIMIT_HEADERS
from server.middleware import BodyLimitMiddleware, ObservabilityMiddleware
from server.routes import chat, completions, health, metrics, models, responses, tokenization
from server.serving import Serving, Siblings, TextLoader
from server.settings import ServerSettings
from server.tracing import otlp_tracer

logger = logging.getLogger(__name__)

LoadCallback = Callable[["asyncio.Task[None]"], None]


def log_load_failure(task: asyncio.Task[None]) -> None:
    """The default end of a load: a failure is logged, and /health stays red."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("The model could not be loaded: %s", error, exc_info=error)


def create_app(
    client: EngineClient,
    load_text: TextLoader,
    settings: ServerSettings,
    *,
    on_load_end: LoadCallback = log_load_failure,
    siblings: Siblings | None = None,
) -> FastAPI:
    """An app that owns `client`: its lifespan starts the engine in the background and closes it.

    load_text: makes the text processor of a loaded engine, whose tokenizer is known only then.
    on_load_end: called with the finished task of the first load, whose exception tells why it failed.
    siblings: where this is one of several front ends.
    """
    tracer = None if settings.otlp_traces_endpoint is None else otlp_tracer(settings.otlp_traces_endpoint)
    serving = Serving(client, load_text, settings, siblings, tracer=tracer)
    app = FastAPI(
        title="medusa-server",
        version=__version__,
        lifespan=_lifespan(serving, on_load_end),
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.serving = serving
    for module in (completions, chat, responses, models, tokenization, health, metrics):
        app.include_router(module.router)
    _add_error_handlers(app)
    # FastAPI caches the document that this completes.
    document = app.openapi()
    openapi.complete(document, settings)
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes, timeout_s=settings.receive_timeout_s)
    if serving.keyring.is_used:
        app.add_middleware(APIKeyMiddleware, keyring=serving.keyring, limiter=serving.limiter)
    app.add_middleware(CrossSiteMiddleware, origins=settings.cors_origin)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "openai-processing-ms", "retry-after", *RATE_LIMIT_HEADERS],
        )
    app.add_middleware(ObservabilityMiddleware, serving=serving, paths=[*document["paths"], *OPEN_PATHS])
    return app


def _lifespan(serving: Serving, on_load_end: LoadCallback) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(serving.load())
        loading.add_done_callback(on_load_end)
        try:
            if serving.siblings is not None and serving.siblings.is_late:
                await asyncio.wait({loading})
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await serving.close()

    return lifespan


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(MedusaError)
    async def answer_medusa_error(_: Request, error: MedusaError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def answer_http_exception(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        return http_error_response(error.status_code, message, code=code, headers=dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def answer_nobody(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
