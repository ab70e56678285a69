"""The OpenAPI document: FastAPI's list of routes, with the bodies, answers and errors that the protocol's classes declare.

Routes parse bodies and encode answers themselves, so FastAPI knows neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema

from medusa_core.errors import CapacityError, EngineError, MedusaError, RequestError
from server.auth import is_guarded
from server.errors import ANSWERS, answer_for
from server.protocol.chat import ChatBody, ChatChunk, ChatCompletion
from server.protocol.common import Body
from server.protocol.completions import Completion, CompletionBody
from server.protocol.errors import ErrorBody
from server.protocol.models import ModelCard, ModelList
from server.protocol.operation import Status, Version
from server.protocol.responses import EVENTS, ResponseObject, ResponsesBody
from server.protocol.tokenization import DetokenizeBody, Detokenized, TokenizeBody, Tokenized
from server.settings import ServerSettings

Schema = dict[str, Any]
Struct = type[msgspec.Struct]
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route takes and gives.

    answer: of status 200; None for an object whose keys the model's files decide. text: media type of an answer that is not JSON.
    chunks: what events of a stream carry; end: data of the last one, if it is not a chunk. errors: statuses with an error object
    beside those of every route, of bodies and of API keys. unavailable: the answer of 503, if it is not an error object.
    """

    body: type[Body] | None = None
    answer: Struct | None = None
    chunks: tuple[Struct, ...] = ()
    end: str | None = "[DONE]"
    errors: tuple[int, ...] = ()
    unavailable: Struct | None = None
    text: str | None = None


OPERATIONS = {
    "/v1/completions": Operation(CompletionBody, Completion, (Completion, ErrorBody), errors=(404, 503)),
    "/v1/chat/completions": Operation(ChatBody, ChatCompletion, (ChatChunk, ErrorBody), errors=(404, 503)),
    "/v1/responses": Operation(ResponsesBody, ResponseObject, EVENTS, None, errors=(404, 503)),
    "/v1/models": Operation(answer=ModelList, errors=(503,)),
    "/v1/models/{name}": Operation(answer=ModelCard, errors=(404, 503)),
    "/tokenize": Operation(TokenizeBody, Tokenized, errors=(404, 503)),
    "/detokenize": Operation(DetokenizeBody, Detokenized, errors=(404, 503)),
    "/tokenizer_info": Operation(errors=(503,)),
    "/health": Operation(answer=Status, unavailable=Status),
    "/ready": Operation(answer=Status, unavailable=Status),
    "/version": Operation(answer=Version),
    "/metrics": Operation(text=CONTENT_TYPE_LATEST),
}

_ERRORS_OF_BODIES = (400, 403, 408, 413)
_API_KEY = "api_key"
_NUMBER = {"type": "string", "pattern": "^[0-9]+$"}
_HEADERS: Schema = {
    "x-request-id": {"description": "The request's own, or a new one.", "schema": {"type": "string"}},
    "openai-processing-ms": {"description": "Milliseconds from the request to the start of its answer.", "schema": _NUMBER},
    "retry-after": {"description": "Seconds after which to try again.", "schema": _NUMBER},
    "www-authenticate": {"schema": {"const": "Bearer"}},
}
_HEADERS_OF_STATUS = {503: ("retry-after",), 429: ("retry-after",), 401: ("www-authenticate",)}
_STREAM = "With `stream: true`, an event for each piece of it."
# The first version that can describe events of a stream.
_OPENAPI_VERSION = "3.2.0"


def complete(document: Schema, settings: ServerSettings) -> None:
    """Write what this server takes and gives, with its settings, into FastAPI's own document."""
    document["openapi"] = _OPENAPI_VERSION
    schemas = {**answer_schemas(), **body_schemas(allow_unknown=settings.allow_unknown_fields)}
    responses = {str(status): _error(status) for status in sorted({answer.status for answer in ANSWERS.values()})}
    document["components"] = {"schemas": schemas, "responses": responses, "headers": _HEADERS}
    has_keys = bool(settings.api_key or settings.api_key_file)
    if has_keys:
        scheme = {"type": "http", "scheme": "bearer", "description": "One of the keys that the server was started with."}
        document["components"]["securitySchemes"] = {_API_KEY: scheme}
    for path, methods in document["paths"].items():
        for route in methods.values():
            _describe(route, OPERATIONS[path], needs_key=has_keys and is_guarded(path))


def _describe(route: Schema, operation: Operation, *, needs_key: bool) -> None:
    statuses = {500, *operation.errors}
    if operation.body is not None:
        route["requestBody"] = {"required": True, "content": _json(_reference(operation.body))}
        statuses.update(_ERRORS_OF_BODIES)
    if needs_key:
        route["security"] = [{_API_KEY: []}]
        statuses.add(401)
        if operation.body is not None:
            statuses.add(429)
    # FastAPI's own promise, 422, is none of ours.
    route["responses"] = {"200": _answer(operation)} | {
        str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)
    }
    if operation.unavailable is not None:
        content = _json(_reference(operation.unavailable))
        route["responses"]["503"] = {"description": "Not now.", "headers": _headers(), "content": content}


def _answer(operation: Operation) -> Schema:
    if operation.text is not None:
        content: Schema = {operation.text: {"schema": {"type": "string"}}}
    else:
        content = _json({"type": "object"} if operation.answer is None else _reference(operation.answer))
    answer: Schema = {"description": "The answer.", "headers": _headers(), "content": content}
    if operation.chunks:
        answer["description"] = f"The answer. {_STREAM}"
        content["text/event-stream"] = {"itemSchema": _event(operation)}
    return answer


def _event(operation: Operation) -> Schema:
    data = {"anyOf": [_reference(chunk) for chunk in operation.chunks]}
    kinds: list[Schema] = [{"type": "string", "contentMediaType": "application/json", "contentSchema": data}]
    if operation.end is not None:
        kinds.append({"const": operation.end})
    return {"type": "object", "required": ["data"], "anyOf": [{"properties": {"data": kind}} for kind in kinds]}


def _error(status: int) -> Schema:
    codes = ", ".join(f"`{code}`" for code in sorted(_codes(status)))
    description = f"{HTTPStatus(status).phrase}. Codes: {codes}."
    headers = _headers(*_HEADERS_OF_STATUS.get(status, ()))
    return {"description": description, "headers": headers, "content": _json(_reference(ErrorBody))}


def _headers(*others: str) -> Schema:
    """Those of every answer, and others."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("x-request-id", "openai-processing-ms", *others)}


def _codes(status: int) -> set[str]:
    """Of all errors that requests meet with this status."""
    bases: tuple[type[MedusaError], ...] = (RequestError, CapacityError, EngineError)
    classes = (cls for base in bases for cls in _with_subclasses(base))
    codes = {cls.code for cls in classes if answer_for(cls("")).status == status}
    return codes | {"internal_error"} if status == 500 else codes


def _with_subclasses(cls: type[E]) -> Iterator[type[E]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _reference(cls: type) -> Schema:
    return {"$ref": f"#/components/schemas/{cls.__name__}"}


def body_schemas(*, allow_unknown: bool) -> dict[str, Schema]:
    """Bodies as JSON clients see them."""
    mode: Literal["validation"] = "validation"
    bodies = [(operation.body, mode) for operation in OPERATIONS.values() if operation.body is not None]
    schemas: dict[str, Schema] = models_json_schema(bodies, ref_template="#/components/schemas/{model}")[1]["$defs"]
    for schema in schemas.values():
        schema["additionalProperties"] = allow_unknown
    return schemas


def answer_schemas() -> dict[str, Schema]:
    """Answers, with all keys as required that are always sent: msgspec lists those without a default only."""
    given = [cls for operation in OPERATIONS.values() for cls in (operation.answer, *operation.chunks, operation.unavailable)]
    used = [cls for cls in given if cls is not None] + [ErrorBody]
    _, schemas = msgspec.json.schema_components(used, ref_template="#/components/schemas/{name}")
    for cls in _structs(msgspec.inspect.multi_type_info(used)):
        schema = schemas[cls.__name__]
        schema["required"] = list(dict.fromkeys([*schema["required"], *_always_sent(cls)]))
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    return schemas


def _always_sent(cls: Struct) -> Iterator[str]:
    for field in msgspec.structs.fields(cls):
        is_left_out = field.default is msgspec.UNSET or (cls.__struct_config__.omit_defaults and not field.required)
        if not is_left_out:
            yield field.encode_name


def _structs(node: object, found: set[Struct] | None = None) -> set[Struct]:
    """All structs that a description of types speaks of. Descriptions are structs themselves."""
    found = set() if found is None else found
    if isinstance(node, msgspec.inspect.StructType):
        if node.cls in found:
            return found
        found.add(node.cls)
    parts: Iterable[object] = ()
    if isinstance(node, msgspec.Struct):
        parts = [getattr(node, name) for name in node.__struct_fields__]
    elif isinstance(node, list | tuple):
        parts = node
    for part in parts:
        _structs(part, found)
    return found
