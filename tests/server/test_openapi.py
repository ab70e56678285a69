"""The OpenAPI document. `Contract` holds it against all answers that the tests of this folder get; test_fuzz.py against made-up
requests; this file checks the rest."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from jsonschema import Draft202012Validator, ValidationError

from server import openapi
from tests.server.contract import Contract
from tests.server.fakes import FakeClient

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
BASES = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": "tiny", "prompt": "Hi"},
    RESPONSES: {"model": "tiny", "input": "Hi"},
}


async def document_of(http):
    return (await http.get("/openapi.json")).json()


def body_schema(document, path):
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return document["components"]["schemas"][reference.rpartition("/")[2]]


async def test_it_describes_all_routes_and_no_others(make_http):
    document = await document_of(await make_http())
    assert document["paths"].keys() == openapi.OPERATIONS.keys()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert not any("422" in operation["responses"] for operation in operations)


async def test_its_schemas_are_valid_and_all_references_lead_to_one(make_http):
    document = await document_of(await make_http())
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    for kind, parts in document["components"].items():
        references = re.findall(f'"#/components/{kind}/([^"]+)"', json.dumps(document))
        # Answers without a key are those of servers that ask for none.
        assert parts.keys() - {"401", "429"} <= set(references) <= parts.keys()
    # Else one would hide the other.
    assert openapi.body_schemas(allow_unknown=False).keys().isdisjoint(openapi.answer_schemas())


def bounds(schema):
    """Pairs of a value and whether it is allowed, around the ends of each range."""
    for kind in schema.get("anyOf", [schema]):
        step = 1 if kind.get("type") == "integer" else 1e-3
        if kind.get("type") not in ("integer", "number"):
            continue
        for keyword, direction in (("minimum", -1), ("maximum", 1)):
            if keyword in kind:
                yield kind[keyword], True
                yield kind[keyword] + direction * step, False
        for keyword, direction in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
            if keyword in kind:
                yield kind[keyword], False
                yield kind[keyword] + direction * step, True


@pytest.mark.parametrize("path", BASES)
async def test_its_ranges_are_those_that_are_enforced(make_http, path):
    http = await make_http()
    num_values = 0
    for field, schema in body_schema(await document_of(http), path)["properties"].items():
        for value, is_allowed in bounds(schema):
            # Some depend on other fields too.
            company = {"best_of": {"n": value}, "n": {"max_tokens": 1}, "min_tokens": {"max_tokens": max(value, 1)}}.get(field, {})
            if (path, field) == (CHAT, "top_logprobs"):
                company = {"logprobs": True}
            response = await http.post(path, json={**BASES[path], **company, field: value})
            error = response.json().get("error") or {}
            is_refused = error.get("code") == "invalid_value" and error["param"] in (field, *company)
            assert is_refused is not is_allowed, (field, value, error)
            num_values += 1
    assert num_values > 15


async def test_ranges_of_typical_acceptance_are_those_that_are_enforced(make_http):
    http = await make_http()
    schema = (await document_of(http))["components"]["schemas"]["Speculative"]
    for field in ("epsilon", "delta"):
        checks = list(bounds(schema["properties"][field]))
        assert len(checks) == 4
        for value, is_allowed in checks:
            body = {**BASES[CHAT], "speculative": {"acceptance": "typical", field: value}}
            assert ((await http.post(CHAT, json=body)).status_code == 200) is is_allowed


@pytest.mark.parametrize("name", ["temperature", "top_p", "seed", "stream", "stream_options", "speculative"])
async def test_fields_may_be_null(make_http, name):
    http = await make_http()
    contract = Contract(await document_of(http))
    for path, base in BASES.items():
        schema = body_schema(await document_of(http), path)
        body = {**base, name: None}
        contract.validate(body, schema)
        assert (await http.post(path, json=body)).status_code == 200


@pytest.mark.parametrize("name", ["stop", "logit_bias", "logprobs"])
async def test_fields_of_chats_and_completions_may_be_null(make_http, name):
    http = await make_http()
    for path in (CHAT, COMPLETIONS):
        body = {**BASES[path], name: None}
        Contract(await document_of(http)).validate(body, body_schema(await document_of(http), path))
        assert (await http.post(path, json=body)).status_code == 200


async def test_biases_are_an_object_of_numbers(make_http):
    document = await document_of(await make_http())
    contract = Contract(document)
    schema = body_schema(document, CHAT)["properties"]["logit_bias"]
    contract.validate({"0": 100, "42": -0.5}, schema)
    for wrong in ({"x": 1}, {"01": 1}, {"5": 101}, {"5": "1"}, [1]):
        with pytest.raises(ValidationError):
            contract.validate(wrong, schema)


@pytest.mark.parametrize("is_allowed", [False, True])
async def test_unknown_fields_are_described_as_they_are_treated(make_http, is_allowed):
    http = await make_http(allow_unknown_fields=is_allowed)
    document = await document_of(http)
    assert all(body_schema(document, path)["additionalProperties"] is is_allowed for path in BASES)
    response = await http.post(CHAT, json={**BASES[CHAT], "unknown": 1})
    assert response.status_code == (200 if is_allowed else 400)


async def test_keys_are_described_where_they_are_asked_for(make_http):
    http = await make_http(api_key=("k",))
    document = await document_of(http)
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            response = await http.request(method, path, content=b"{}")
            assert (response.status_code == 401) == ("security" in operation) == ("401" in operation["responses"])
    assert "securitySchemes" not in (await document_of(await make_http()))["components"]


async def test_a_stream_ends_with_its_last_event(make_http):
    """Clients that keep connections wait for the end of the body after `[DONE]`."""
    http = await make_http(FakeClient(), sse_ping_s=1000)
    body = json.dumps({**BASES[CHAT], "stream": True}).encode()
    received = iter([{"type": "http.request", "body": body, "more_body": False}])
    messages = []

    async def receive():
        # The client stays until all is sent.
        return next(received, None) or await asyncio.Event().wait()

    async def send(message):
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b"", "http_version": "1.1"}
    await http.app({**scope, "scheme": "http", "server": ("test", 80), "root_path": ""}, receive, send)
    assert messages[-1]["body"].endswith(b"data: [DONE]\n\n")
    assert not messages[-1]["more_body"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/v1", "/"])
async def test_endpoints_that_do_not_exist_are_errors_of_the_api(make_http, path):
    response = await (await make_http()).post(path, json={"model": "tiny", "input": "x"})
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": f"POST {path}: Not Found.",
        "type": "invalid_request_error",
        "param": None,
        "code": "not_found",
    }
