"""Structured output with the OpenAI SDK, on the real model: every answer parses, whatever the model would have liked to say."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from tests.e2e.server_process import MODEL, Server

pytestmark = pytest.mark.demo


class City(BaseModel):
    # without it a schema allows any other property, and a small model finds many
    model_config = ConfigDict(extra="forbid")

    name: str
    country: str
    population_millions: float
    languages: list[str]
    climate: Literal["tropical", "dry", "temperate", "continental", "polar"]


TELL = [{"role": "user", "content": "Tell me about Lisbon. Answer in JSON."}]


def test_the_sdk_parses_an_answer_into_a_model(server: Server):
    completion = server.sdk().chat.completions.parse(
        model=MODEL, messages=TELL, response_format=City, temperature=0, max_tokens=200
    )
    city = completion.choices[0].message.parsed
    assert completion.choices[0].finish_reason == "stop"
    assert isinstance(city, City)
    assert "Lisb" in city.name


def test_speculation_changes_no_token_and_works(server: Server):
    schema = {"name": "city", "schema": City.model_json_schema(), "strict": True}
    body = {"model": MODEL, "messages": TELL, "max_tokens": 120, "response_format": {"type": "json_schema", "json_schema": schema}}
    for drawn in ({"temperature": 0}, {"temperature": 0.8, "seed": 4}):
        answers = [
            server.http.post("/v1/chat/completions", json={**body, **drawn, "speculative": {"enabled": enabled}}).json()
            for enabled in (True, False)
        ]
        with_drafts, without = (answer["choices"][0]["message"]["content"] for answer in answers)
        assert City.model_validate_json(with_drafts)
        assert City.model_validate_json(without)
        if drawn["temperature"] == 0:
            assert answers[0]["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0
        assert answers[1]["metrics"]["speculative_decoding"] is None


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
        ({"structured_outputs": {"regex": r"[A-Z][a-z]{2,9}, \d{4}"}}, lambda text: text[-4:].isdecimal() and text[-6:-4] == ", "),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-z ]{1,20}/ ">"'}}, lambda text: text[0] + text[-1] == "<>"),
    ],
)
def test_other_forms_on_both_endpoints(server: Server, fields, check):
    messages = [{"role": "user", "content": "Name a colour and describe it in JSON."}]
    options = {"model": MODEL, "max_tokens": 150, "temperature": 0.7, "n": 2, **fields}
    for path, prompt in (("chat/completions", {"messages": messages}), ("completions", {"prompt": "A colour: "})):
        answer = server.http.post(f"/v1/{path}", json={**options, **prompt}).json()
        for choice in answer["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            if choice["finish_reason"] == "stop":
                assert check(text), text


def test_a_stream_of_json(server: Server):
    options = {"model": MODEL, "messages": TELL, "temperature": 0, "max_tokens": 200}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}}
    stream = server.sdk().chat.completions.create(**options, response_format=form, stream=True)
    text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    assert City.model_validate_json(text)


def test_a_grammar_that_cannot_be_used_costs_one_request(server: Server):
    for fields in ({"regex": "(a"}, {"regex": r"[^\s\S]"}, {"json": {"not": {}}}):
        response = server.http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", "structured_outputs": fields})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"structured_outputs.{next(iter(fields))}"
    assert server.text("1, 2, 3, 4, 5,", max_tokens=4)
