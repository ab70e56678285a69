"""`GET /metrics`, in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.serving import Serving

router = APIRouter(tags=["operation"])


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """HTTP metrics from the start, engine metrics once the model is loaded."""
    serving: Serving = request.app.state.serving
    return Response(await serving.metrics_page(), media_type=CONTENT_TYPE_LATEST)
