"""`response_format` and `structured_outputs`: what reaches the engine, and what is refused before it."""

from __future__ import annotations

import json

import pytest

from medusa_core.params import Grammar
from tests.server.fakes import FakeClient

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PROMPTS = {CHAT: {"messages": [{"role": "user", "content": "Hi"}]}, COMPLETIONS: {"prompt": "Hi"}}
# keys in an order of their own, which is that of the output
SCHEMA = {
    "type": "object",
    "properties": {"z": {"type": "string", "const": "é"}, "a": {"type": "integer"}},
    "required": ["z", "a"],
}
OBJECT = Grammar(kind="json_schema", text='{"type": "object"}', field="response_format")


def schema_format(schema: object, **fields: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **fields}}


async def post(http, path, **body):
    return await http.post(path, json={"model": "tiny", **PROMPTS[path], **body})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "kind", "text", "field"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}', "response_format"),
        (
            {"response_format": schema_format(SCHEMA, strict=True, description="A thing.")},
            "json_schema",
            json.dumps(SCHEMA, ensure_ascii=False),
            "response_format.json_schema.schema",
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            "json_schema",
            json.dumps(SCHEMA, ensure_ascii=False),
            "structured_outputs.json",
        ),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", json.dumps(SCHEMA), "structured_outputs.json"),
        ({"structured_outputs": {"regex": r"\d+"}}, "regex", r"\d+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "cfg", 'start: "a"', "structured_outputs.grammar"),
        (
            {"structured_outputs": {"json_object": True, "regex": None}},
            "json_schema",
            '{"type": "object"}',
            "structured_outputs.json_object",
        ),
        ({"structured_outputs": {"regex": "a", "json_object": False}}, "regex", "a", "structured_outputs.regex"),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, "regex", "a", "structured_outputs.regex"),
    ],
)
async def test_the_engine_gets_the_grammar(make_http, path, fields, kind, text, field):
    client = FakeClient()
    response = await post(await make_http(client), path, **fields)
    assert response.status_code == 200, response.text
    assert client.requests[0].params.grammar == Grammar(kind=kind, text=text, field=field)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}]
)
async def test_text_is_free(make_http, path, fields):
    client = FakeClient()
    assert (await post(await make_http(client), path, **fields)).status_code == 200
    assert client.requests[0].params.grammar is None


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
        ({"response_format": schema_format("x")}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"not": {}})}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"type": "thing"})}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"enum": ["x" * 70_000]})}, "response_format.json_schema.schema"),
        ({"response_format": schema_format(SCHEMA, schemas=1)}, "response_format.json_schema.schemas"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"grammar": "(((("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"guided_json": SCHEMA}, "guided_json"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_name(make_http, path, fields, param):
    client = FakeClient()
    http = await make_http(client)
    response = await post(http, path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000
    assert client.requests == []
    assert (await post(http, path)).status_code == 200


async def test_a_schema_nested_too_deeply_is_refused(make_http):
    http = await make_http()
    for depth in (100, 150, 300, 900, 5000):
        schema = '{"items":' * depth + "{}" + "}" * depth
        body = f'{{"model": "tiny", "prompt": "Hi", "structured_outputs": {{"json": {schema}}}}}'
        response = await http.post(COMPLETIONS, content=body.encode())
        assert response.status_code == (200 if depth < 120 else 400), depth
