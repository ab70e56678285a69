"""`POST /v1/responses`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.respond import respond_to_response

router = APIRouter(tags=["generation"])


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    """Answer a conversation, as items. Nothing is stored."""
    return await respond_to_response(request, request.app.state.serving)
