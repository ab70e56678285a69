"""`GET /v1/models` and one model. Known from the first load on, also while the engine restarts."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import json_response
from server.protocol.common import encode
from server.protocol.models import ModelCard, ModelList
from server.served_model import ServedModel

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """One card per served name."""
    model = request.app.state.serving.loaded_model()
    return json_response(encode(ModelList(data=[_card(model, name) for name in model.names])))


# Names may contain slashes.
@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """The card of one served name."""
    model = request.app.state.serving.loaded_model()
    model.check_name(name)
    return json_response(encode(_card(model, name)))


def _card(model: ServedModel, name: str) -> ModelCard:
    return ModelCard(id=name, created=model.created, root=model.info.model_name, max_model_len=model.info.max_model_len)
