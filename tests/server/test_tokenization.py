"""Text to token ids and back over HTTP, in the shapes that other servers have."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.fakes import FakeClient, FakeText

MESSAGES = [{"role": "user", "content": "Hi"}]


async def test_a_prompt_becomes_token_ids_and_text_again(make_http):
    http = await make_http()
    answer = (await http.post("/tokenize", json={"model": "tiny", "prompt": "abc"})).json()
    assert answer == {
        "count": 3,
        "max_model_len": http.app.state.serving.model.info.max_model_len,
        "tokens": [97, 98, 99],
        "token_strs": None,
    }
    back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert (back.status_code, back.json()) == (200, {"prompt": "abc"})


async def test_tokens_as_strings_are_there_on_request(make_http):
    answer = await (await make_http()).post("/tokenize", json={"prompt": "ab", "return_token_strs": True})
    assert answer.json()["token_strs"] == ["<a>", "<b>"]


async def test_messages_are_rendered_by_the_chat_template(make_http):
    http = await make_http()
    tokens = (await http.post("/tokenize", json={"messages": MESSAGES})).json()["tokens"]
    assert "".join(map(chr, tokens)) == "user:Hi|"
    tokens = (await http.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False})).json()["tokens"]
    assert "".join(map(chr, tokens)) == "user:Hi"


async def test_tools_are_rendered_as_a_chat_renders_them(make_http):
    text = FakeText()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    http = await make_http(text=text)
    assert (await http.post("/tokenize", json={"messages": MESSAGES, "tools": [tool]})).status_code == 200
    assert text.last_kwargs == {"tools": [tool]}


async def test_the_tokenizer_tells_about_itself(make_http):
    answer = await (await make_http()).get("/tokenizer_info")
    assert (answer.status_code, answer.json()["eos_token"]) == (200, "</s>")


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/tokenize", {}, 400, "invalid_value", None),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "invalid_value", None),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, 400, "invalid_value", None),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, 400, "invalid_value", None),
        ("/tokenize", {"prompt": "a", "tools": []}, 400, "invalid_value", None),
        ("/tokenize", {"messages": MESSAGES, "tools": [5]}, 400, "invalid_value", "tools[0]"),
        ("/tokenize", {"prompt": 5}, 400, "invalid_value", "prompt"),
        ("/tokenize", {"messages": []}, 400, "invalid_value", "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "unsupported_parameter", "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "surprise": 1}, 400, "unknown_parameter", "surprise"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model_not_found", "model"),
        ("/detokenize", {}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "invalid_value", "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_prompt", "tokens"),
        ("/detokenize", {"tokens": [2**40]}, 400, "invalid_prompt", "tokens"),
        ("/detokenize", {"tokens": [97], "model": "other"}, 404, "model_not_found", "model"),
    ],
)
async def test_wrong_bodies_are_named(make_http, path, body, status, code, param):
    answer = await (await make_http()).post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


@pytest.mark.parametrize(("method", "path"), [("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")])
async def test_keys_guard_the_tokenizer(make_http, method, path):
    http = await make_http(api_key=["secret"])
    assert (await http.request(method, path, json={"prompt": "a"})).status_code == 401


async def test_the_tokenizer_is_there_while_the_engine_restarts(make_http):
    client = FakeClient()
    http = await make_http(client)
    client.is_alive = False
    assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 200


async def test_before_the_model_is_loaded_clients_are_told_to_wait(make_http):
    http = await make_http(FakeClient(loading=asyncio.Event()))
    assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 503
