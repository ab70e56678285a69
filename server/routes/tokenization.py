"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`. They need the model's tokenizer, not its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import json_response
from server.body import read_body
from server.convert import detokenized, tokenized
from server.protocol.common import Body, encode
from server.protocol.tokenization import DetokenizeBody, TokenizeBody
from server.served_model import ServedModel
from server.serving import Serving

B = TypeVar("B", bound=Body)

router = APIRouter(tags=["tokenization"])


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of a conversation in the model's chat format."""
    return await _respond(request, TokenizeBody, tokenized)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of token ids, special tokens included."""
    return await _respond(request, DetokenizeBody, detokenized)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's class in transformers, its special tokens and its chat template."""
    serving: Serving = request.app.state.serving
    return json_response(encode(serving.loaded_model().text.tokenizer_info()))


async def _respond(request: Request, body_class: type[B], work: Callable[[B, ServedModel], msgspec.Struct]) -> Response:
    """The answer to a body, worked out on a text thread."""
    serving: Serving = request.app.state.serving
    body = await read_body(request, body_class, allow_unknown=serving.settings.allow_unknown_fields)
    model = serving.loaded_model()
    return json_response(encode(await asyncio.get_running_loop().run_in_executor(serving.text_threads, work, body, model)))
