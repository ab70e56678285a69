"""One generation request from body to answer, streamed or whole."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from medusa_core.errors import EngineError
from server.answers import json_response
from server.body import read_body
from server.convert import Job, chat_job, completion_job, new_output
from server.disconnect import ClientGoneError, unless_gone
from server.errors import CLIENT_CLOSED_REQUEST
from server.generation import ChoiceUpdate, Generation, Updates
from server.protocol.chat import ChatBody
from server.protocol.common import Body, GenerationBody, encode
from server.protocol.completions import CompletionBody
from server.protocol.responses import ResponsesBody
from server.replies import ChatReply, CompletionReply, FinishedChoice, Reply
from server.request_info import request_info
from server.responses import ResponseReply, as_chat, response_job
from server.served_model import ServedModel
from server.serving import Serving
from server.streaming.sse import TokenStream, frames

B = TypeVar("B", bound=Body)
G = TypeVar("G", bound=GenerationBody)


async def respond_to_completion(request: Request, serving: Serving) -> Response:
    """`POST /v1/completions`. Raises MedusaError."""
    model, body = await _accept(request, serving, CompletionBody)
    make_reply = partial(CompletionReply, body, text=model.text)
    return await _respond(request, serving, model, body, completion_job, make_reply)


async def respond_to_chat(request: Request, serving: Serving) -> Response:
    """`POST /v1/chat/completions`. Raises MedusaError."""
    model, body = await _accept(request, serving, ChatBody)
    return await _respond(request, serving, model, body, chat_job, partial(ChatReply, body, text=model.text))


async def respond_to_response(request: Request, serving: Serving) -> Response:
    """`POST /v1/responses`. Raises MedusaError."""
    model, body = await _accept(request, serving, ResponsesBody)
    return await _respond(request, serving, model, as_chat(body), response_job, partial(ResponseReply, body, text=model.text))


async def _accept(request: Request, serving: Serving, body_class: type[B]) -> tuple[ServedModel, B]:
    # A server that takes no requests says so whatever they contain, but only once it has received them: a connection that closes on
    # data still under way is reset, and the client may never see the answer.
    await request.body()
    model = serving.require_model()
    return model, await read_body(request, body_class, allow_unknown=serving.settings.allow_unknown_fields)


async def _respond(
    request: Request,
    serving: Serving,
    model: ServedModel,
    body: G,
    make_job: Callable[..., Job],
    make_reply: Callable[[str, list[list[int]]], Reply],
) -> Response:
    """make_reply: called with an id that no other answer has and the prompts' token ids."""
    model.check_name(body.model)
    # Clients choose x-request-id and may repeat it; the engine needs an id that no live request has.
    unique_id = uuid.uuid4().hex
    info = request_info(request.scope)
    salt = info.key_name or "" if serving.settings.isolate_keys else ""
    make = partial(make_job, body, model, request_id=unique_id, arrival_s=info.arrival_s, cache_salt=salt)
    job = await asyncio.get_running_loop().run_in_executor(serving.text_threads, make)
    generation = Generation(
        serving.client,
        job,
        partial(new_output, body, model),
        model.metrics,
        max_depth=model.info.max_depth,
        has_token_ids=bool(body.return_token_ids) or body.num_logprobs is not None,
    )
    reply = make_reply(unique_id, generation.prompts)
    info.body, info.generation, info.reply_id = body, generation, reply.id
    try:
        if body.stream:
            return await _stream(request, serving, generation, reply)
        return await unless_gone(request.receive, _whole(generation, reply))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _stream(request: Request, serving: Serving, generation: Generation, reply: Reply) -> Response:
    """Waits for the first update, so that a refusal by the engine (queue full) is still an HTTP status."""
    updates = generation.updates()
    first = await unless_gone(request.receive, _first(updates))
    content = frames(reply, generation, first, updates)
    return TokenStream(content, updates, ping_s=serving.settings.sse_ping_s)


async def _first(updates: Updates) -> list[ChoiceUpdate]:
    async for batch in updates:
        return batch
    raise EngineError("The engine ended the request without an answer.", hint="Try again.")


async def _whole(generation: Generation, reply: Reply) -> Response:
    choices = [FinishedChoice() for _ in range(generation.num_choices)]
    async with aclosing(generation.updates()) as updates:
        async for batch in updates:
            for update in batch:
                choices[update.index].add(update)
    return json_response(encode(reply.whole(choices, generation.usage, generation.request_metrics)))
