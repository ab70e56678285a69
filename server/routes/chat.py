"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.respond import respond_to_chat

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    return await respond_to_chat(request, request.app.state.serving)
