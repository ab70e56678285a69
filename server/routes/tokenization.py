"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`. They need the model's tokenizer, not its engine."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.body import read_body
from server.convert import detokenized, tokenized
from server.errors import json_response
from server.protocol.common import encode
from server.protocol.tokenization import DetokenizeBody, TokenizeBody
from server.serving import Serving

router = APIRouter(tags=["tokenization"])


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of a conversation in the model's chat format."""
    serving: Serving = request.app.state.serving
    body = await read_body(request, TokenizeBody, allow_unknown=serving.settings.allow_unknown_fields)
    work = partial(tokenized, body, serving.loaded_model())
    return json_response(encode(await asyncio.get_running_loop().run_in_executor(serving.text_threads, work)))


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of token ids, special tokens included."""
    serving: Serving = request.app.state.serving
    body = await read_body(request, DetokenizeBody, allow_unknown=serving.settings.allow_unknown_fields)
    work = partial(detokenized, body, serving.loaded_model())
    return json_response(encode(await asyncio.get_running_loop().run_in_executor(serving.text_threads, work)))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's class, special tokens and chat template, named as in tokenizer_config.json."""
    serving: Serving = request.app.state.serving
    return json_response(encode(serving.loaded_model().text.tokenizer_info()))
