"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.respond import respond_to_completion

router = APIRouter(tags=["generation"])


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Continue prompts: text or token ids, one or several."""
    return await respond_to_completion(request, request.app.state.serving)
