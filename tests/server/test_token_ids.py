"""`return_token_ids`: the tokens behind a text, as far as the text goes."""

from __future__ import annotations

import json

from tests.server.fakes import EOS, FakeClient
from tests.server.test_completions import post, stream

MESSAGES = [{"role": "user", "content": "Hi"}]
HELLO = [*map(ord, "Hello world 0"), EOS]


async def test_completions_carry_the_ids_of_prompt_and_output(make_http):
    (choice,) = (await post(await make_http(), return_token_ids=True)).json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 105], HELLO)
    (choice,) = (await post(await make_http())).json()["choices"]
    assert not choice.keys() & {"prompt_token_ids", "token_ids"}


async def test_each_choice_has_its_own_prompt(make_http):
    answer = (await post(await make_http(), prompt=["a", "bc"], n=2, return_token_ids=True)).json()
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97], [97], [98, 99], [98, 99]]


async def test_chunks_of_a_stream_add_up(make_http):
    chunks = await stream(await make_http(), n=2, return_token_ids=True)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(2):
        of_one = [choice for choice in choices if choice["index"] == index]
        assert [token_id for choice in of_one for token_id in choice["token_ids"]] == [*map(ord, f"Hello world {index}"), EOS]
        assert [choice.get("prompt_token_ids") for choice in of_one] == [[72, 105]] + [None] * (len(of_one) - 1)


async def test_tokens_behind_a_stop_string_are_left_out(make_http):
    for text in ("whole", "stream"):
        http = await make_http(FakeClient())
        if text == "whole":
            ids = (await post(http, stop="wo", return_token_ids=True)).json()["choices"][0]["token_ids"]
        else:
            chunks = await stream(http, stop="wo", return_token_ids=True)
            ids = [token_id for chunk in chunks for choice in chunk["choices"] for token_id in choice["token_ids"]]
        # those that completed it count, as in usage
        assert ids == [*map(ord, "Hello wo")]


async def test_chats_carry_them_too(make_http):
    body = {"model": "tiny", "messages": MESSAGES, "return_token_ids": True}
    prompt = [*map(ord, "user:Hi|")]
    answer = (await (await make_http()).post("/v1/chat/completions", json=body)).json()
    assert (answer["prompt_token_ids"], answer["choices"][0]["token_ids"]) == (prompt, HELLO)
    response = await (await make_http()).post("/v1/chat/completions", json={**body, "stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt] + [None] * (len(chunks) - 1)
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])] == HELLO
