"""Every wrong request is a clear error in the form of the API, and disturbs nothing else."""

from __future__ import annotations

import pytest

from medusa_core.errors import (
    DrainingError,
    EngineDeadError,
    EngineNotReadyError,
    MedusaError,
    QueueFullError,
    UnsupportedParameterError,
)
from server import errors
from tests.server.fakes import FakeClient

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def error_of(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] is None or isinstance(error["code"], str)
    return error


async def chat_error(http, status=400, **body):
    return error_of(await http.post(CHAT, json={"model": "tiny", "messages": MESSAGES, **body}), status)


async def completion_error(http, status=400, **body):
    return error_of(await http.post(COMPLETIONS, json={"model": "tiny", "prompt": "Hi", **body}), status)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 10**30),
        ("min_p", 1.5),
        ("n", 0),
        ("n", -1),
        ("n", 129),
        ("n", 1.0),
        ("n", "1"),
        ("max_tokens", -3),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", 1.5),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 10**12),
        ("seed", 2**63),
        ("seed", "7"),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1000]),
        ("stop_token_ids", ["a"] * 5000),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("stream_options", 3),
        ("priority", 1.5),
        ("ignore_eos", 1),
        ("speculative", True),
        ("model", 7),
        ("model", None),
    ],
)
async def test_wrong_values_name_their_field(make_http, field, value):
    for error in (
        await completion_error(await make_http(), **{field: value}),
        await chat_error(await make_http(), **{field: value}),
    ):
        assert error["type"] == "invalid_request_error"
        assert error["code"] == "invalid_value"
        assert error["param"].startswith(field)


@pytest.mark.parametrize(
    "prompt",
    [[], 5, {}, [[]], [1, "a"], ["a", 1], [1.5], [True], [[1], "a"], [[1, None]], [-1], [1000], [[5], [1000]], [10**4000], ""],
)
async def test_wrong_prompts(make_http, prompt):
    error = await completion_error(await make_http(), prompt=prompt)
    assert error["param"] == "prompt"
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([1], "messages[0]"),
        ([{"content": "Hi"}], "messages[0]"),
        ([{"role": "robot", "content": "Hi"}], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "txt"}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([*MESSAGES, {"role": "tool", "content": "x"}], "messages[1].tool_call_id"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].type"),
    ],
)
async def test_wrong_messages_name_the_place(make_http, messages, param):
    error = await chat_error(await make_http(), messages=messages)
    assert (error["code"], error["param"]) == ("invalid_value", param)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "best_of", 3),
        (CHAT, "tools", [{"type": "custom", "custom": {"name": "f"}}]),
        (CHAT, "tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
        (CHAT, "functions", [{}]),
        (CHAT, "function_call", {"name": "f"}),
        (CHAT, "audio", {}),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "web_search_options", {}),
        (CHAT, "moderation", {}),
    ],
)
async def test_known_fields_that_are_not_supported_are_named(make_http, path, field, value):
    base = {"model": "tiny", "messages": MESSAGES} if path == CHAT else {"model": "tiny", "prompt": "Hi"}
    error = error_of(await (await make_http()).post(path, json={**base, field: value}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert field in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.5),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e6),
        ("repetition_penalty", 1e-45),
        ("logit_bias", [5]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"01": 1, "1": 2}),
        ("logit_bias", {"": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": 10**400}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": None}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"9" * 5000: 1}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_penalties_and_biases_out_of_range_are_named(make_http, path, field, value):
    base = {"model": "tiny", "messages": MESSAGES} if path == CHAT else {"model": "tiny", "prompt": "Hi"}
    error = error_of(await (await make_http()).post(path, json={**base, field: value}))
    assert (error["code"], error["param"]) == ("invalid_value", field)
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"suffix": 5}, "invalid_value"),
        ({"suffix": "x", "prompt": [5] * 300}, "invalid_value"),
        ({"suffix": "x", "prompt": [[5]]}, "invalid_value"),
        ({"suffix": "x", "echo": True, "logprobs": 1}, "unsupported_parameter"),
    ],
)
async def test_suffixes_that_cannot_be_used(make_http, extra, code):
    error = await completion_error(await make_http(), **extra)
    assert (error["code"], error["param"]) == (code, "suffix")


async def test_images_are_not_supported(make_http):
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    error = await chat_error(await make_http(), messages=[{"role": "user", "content": [part]}])
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages[0].content")


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"speculative": {"on": True}}, "speculative.on"),
        ({"messages": [{"role": "user", "content": "Hi", "mood": "good"}]}, "messages[0].mood"),
    ],
)
async def test_unknown_fields_are_refused_unless_a_flag_lets_them_pass(make_http, extra, param):
    error = await chat_error(await make_http(), **extra)
    assert (error["code"], error["param"]) == ("unknown_parameter", param)
    lenient = await make_http(allow_unknown_fields=True)
    response = await lenient.post(CHAT, json={"model": "tiny", "messages": MESSAGES, **extra})
    assert response.status_code == 200


@pytest.mark.parametrize("field", ["model", "prompt"])
async def test_missing_fields_are_named(make_http, field):
    body = {"model": "tiny", "prompt": "Hi"}
    del body[field]
    error = error_of(await (await make_http()).post(COMPLETIONS, json=body))
    assert error["param"] == field
    assert "required" in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"5",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x"} trailing',
        b'{"model": "tiny", "prompt": [' + b"9" * 5000 + b"]}",
        b'{"a":' * 50_000,
        b"[" * 500_000,
    ],
    ids=lambda raw: repr(raw[:40]),
)
async def test_malformed_json_is_a_bad_request(make_http, raw):
    error = error_of(await (await make_http()).post(COMPLETIONS, content=raw))
    assert error["code"] == "invalid_json"
    assert len(error["message"]) < 500


async def test_messages_about_many_errors_are_bounded(make_http):
    http = await make_http()
    many = await completion_error(http, **{f"unknown_{index}": "x" * 500 for index in range(50)})
    assert len(many["message"]) < 10 * 300
    assert "40 more errors" in many["message"]
    thousands = await completion_error(http, **{f"k{index}": 1 for index in range(20_000)})
    assert len(thousands["message"]) < 200
    long_value = await completion_error(http, temperature="x" * 100_000)
    assert len(long_value["message"]) < 500
    long_name = await completion_error(http, **{"y" * 100_000: 1})
    assert len(long_name["message"]) < 500


async def test_unknown_model_is_not_found(make_http):
    http = await make_http()
    for error in (await chat_error(http, 404, model="gpt-9"), await completion_error(http, 404, model="")):
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "tiny" in error["message"]


async def test_context_overflow(make_http):
    http = await make_http()
    too_long = await completion_error(http, prompt="x" * 256)
    assert (too_long["code"], too_long["param"]) == ("context_length_exceeded", "prompt")
    assert "256" in too_long["message"]
    too_many = await completion_error(http, max_tokens=255)
    assert too_many["code"] == "context_length_exceeded"
    chat = await chat_error(http, max_completion_tokens=250)
    assert (chat["code"], chat["param"]) == ("context_length_exceeded", "messages")


async def test_choices_per_request_are_limited(make_http):
    client = FakeClient()
    http = await make_http(client)
    assert (await completion_error(http, prompt=["a"] * 65, n=2))["param"] == "n"
    assert (await completion_error(http, prompt=["a"] * 200))["param"] == "prompt"
    assert client.requests == []


@pytest.mark.parametrize(("field", "value"), [("logprobs", True), ("echo", 1), ("best_of", "2")])
async def test_wrong_values_of_completions_name_their_field(make_http, field, value):
    error = await completion_error(await make_http(), **{field: value})
    assert (error["code"], error["param"]) == ("invalid_value", field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_wrong_values_of_chats_name_their_field(make_http, fields, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
    response = await (await make_http()).post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"speculative": {"acceptance": "loose"}}, "speculative.acceptance"),
        ({"speculative": {"epsilon": 0.1}}, "speculative.epsilon"),
        ({"speculative": {"max_nodes": 0}}, "speculative.max_nodes"),
        ({"speculative": {"acceptance": "typical", "epsilon": 0}}, "speculative.epsilon"),
        ({"speculative": {"acceptance": "typical", "delta": 1.5}}, "speculative.delta"),
        ({"speculative": {"acceptance": "typical"}, "top_p": 0.9}, "top_p"),
    ],
)
async def test_wrong_speculation_names_its_field(make_http, fields, param):
    assert (await completion_error(await make_http(), **fields))["param"] == param


async def test_typical_acceptance_reaches_the_engine(make_http):
    client = FakeClient()
    for speculative in (
        {"acceptance": "typical"},
        {"acceptance": "typical", "epsilon": 0.2, "delta": 0.5},
        {"acceptance": "exact"},
    ):
        body = {"model": "tiny", "prompt": "Hi", "speculative": speculative}
        assert (await (await make_http(client)).post(COMPLETIONS, json=body)).status_code == 200
    assert [request.params.typical_acceptance for request in client.requests] == [(0.09, pytest.approx(0.3)), (0.2, 0.5), None]


async def test_min_tokens_above_max_tokens(make_http):
    assert (await completion_error(await make_http(), min_tokens=9, max_tokens=3))["param"] == "min_tokens"


async def test_best_of_below_n(make_http):
    assert (await completion_error(await make_http(), n=3, best_of=2))["code"] == "invalid_value"


async def test_unknown_routes_and_methods_answer_in_the_same_form(make_http):
    http = await make_http()
    assert error_of(await http.get("/v1/nope"), 404)["code"] == "not_found"
    response = await http.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (QueueFullError("The queue is full."), 503, "server_overloaded"),
        (DrainingError("Going down."), 503, "server_draining"),
        (EngineNotReadyError("Restarting."), 503, "engine_not_ready"),
        (EngineDeadError("Dead."), 500, "engine_dead"),
        (UnsupportedParameterError("No.", param="min_p"), 400, "unsupported_parameter"),
    ],
)
async def test_refusals_by_the_engine_are_statuses_also_for_streams(make_http, stream, refusal, status, code):
    http = await make_http(FakeClient(refusal=refusal))
    response = await http.post(CHAT, json={"model": "tiny", "messages": MESSAGES, "stream": stream})
    error = error_of(response, status)
    assert error["code"] == code
    assert ("retry-after" in response.headers) == (status == 503)
    if status == 503:
        assert 0 < int(response.headers["retry-after"]) <= 120


def test_the_table_covers_every_error_class():
    def subclasses(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from subclasses(sub)

    found = set(subclasses(MedusaError))
    assert errors.RequestTooLargeError in found
    for cls in found:
        answer = errors.answer_for(cls("message"))
        assert 400 <= answer.status <= 503
        assert answer.type in ("invalid_request_error", "server_error")
        assert isinstance(cls.code, str)
        assert (answer.status == 503) == (answer.retry_after_s is not None)


async def test_bugs_are_answered_with_500_and_keep_their_details(make_http):
    def fail(*_):
        raise ZeroDivisionError("secret detail")

    http = await make_http(FakeClient(answer=fail))
    response = await http.post(CHAT, json={"model": "tiny", "messages": MESSAGES})
    error = error_of(response, 500)
    assert error["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
