"""`GET /metrics`, in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from medusa_core.outputs import EngineStats
from server.metrics import render
from server.serving import Serving

router = APIRouter(tags=["operation"])


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """HTTP metrics from the start, engine metrics once the model is loaded."""
    serving: Serving = request.app.state.serving
    if serving.model is not None:
        # A dead engine runs nothing, whatever its last snapshot said; its totals start again at 0.
        serving.model.engine_metrics.update(serving.client.stats if serving.client.is_ready else EngineStats())
    page = render(
        serving.registry.collect(),
        serving.engine_registry.collect(),
        has_vllm_names=not serving.settings.no_vllm_metrics,
    )
    return Response(page, media_type=CONTENT_TYPE_LATEST)
