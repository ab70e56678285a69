"""`/health` (restart me?), `/ready` (send me requests?) and `/version`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from medusa_core import __version__
from server.answers import json_response
from server.protocol.common import encode
from server.protocol.operation import Status, Version
from server.serving import Serving

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine lives or loads for the first time, 503 once it is dead."""
    serving: Serving = request.app.state.serving
    return _status("ok" if serving.is_healthy else "engine dead", is_good=serving.is_healthy)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests are taken, 503 while loading, restarting or draining."""
    serving: Serving = request.app.state.serving
    if serving.is_ready:
        return _status("ready", is_good=True)
    if serving.is_draining:
        return _status("draining", is_good=False)
    return _status("loading" if serving.model is None else "restarting", is_good=False)


@router.get("/version")
async def version() -> Response:
    """The server's version."""
    return json_response(encode(Version(__version__)))


def _status(status: str, *, is_good: bool) -> Response:
    return json_response(encode(Status(status)), status=200 if is_good else 503)
