"""Log-probabilities and echoed prompts in the answers of both endpoints."""

from __future__ import annotations

import json
import re

import pytest

from tests.server.fakes import EOS, FakeClient, FakeText
from tests.server.test_completions import post, stream

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
HELLO = "Hello world 0"


def expected_chat(text: str, num_top: int) -> list[dict[str, object]]:
    """As the fake engine scores them."""
    tops = [{"token": chr(65 + rank), "logprob": -0.5, "bytes": [65 + rank]} for rank in range(num_top)]
    content = [
        {"token": character, "logprob": -ord(character) / 4, "bytes": list(character.encode()), "top_logprobs": tops}
        for character in text
    ]
    return [*content, {"token": "</s>", "logprob": 0.0, "bytes": list(b"</s>"), "top_logprobs": tops}]


@pytest.mark.parametrize("num_top", [None, 0, 2])
async def test_chat(make_http, num_top):
    body = {**CHAT, "logprobs": True, "top_logprobs": num_top}
    http = await make_http()
    (choice,) = (await http.post("/v1/chat/completions", json=body)).json()["choices"]
    assert choice["logprobs"] == {"content": expected_chat(HELLO, num_top or 0), "refusal": None}
    assert "token_ids" not in choice
    response = await http.post("/v1/chat/completions", json={**body, "stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    streamed = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [entry for part in streamed if part for entry in part["content"]] == expected_chat(HELLO, num_top or 0)


async def test_the_sdk_reads_them_strictly(make_sdk):
    sdk = await make_sdk()
    answer = await sdk.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    assert [entry.token for entry in answer.choices[0].logprobs.content] == [*HELLO, "</s>"]
    completion = await sdk.completions.create(model="tiny", prompt="Hi", logprobs=1)
    assert completion.choices[0].logprobs.tokens == [*HELLO, "</s>"]


async def test_completions(make_http):
    (choice,) = (await post(await make_http(), logprobs=1)).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": [*HELLO, "</s>"],
        "token_logprobs": [*(-ord(character) / 4 for character in HELLO), 0.0],
        "text_offset": list(range(14)),
        # with the token itself
        "top_logprobs": [*({"A": -0.5, character: -ord(character) / 4} for character in HELLO), {"A": -0.5, "</s>": 0.0}],
    }


async def test_an_echoed_prompt_is_scored(make_http):
    (choice,) = (await post(await make_http(), echo=True, logprobs=0, max_tokens=2)).json()["choices"]
    assert choice["text"] == "HiHe"
    assert choice["logprobs"] == {
        "tokens": [*"HiHe"],
        "token_logprobs": [None, -ord("i") / 4, -ord("H") / 4, -ord("e") / 4],
        "text_offset": [0, 1, 2, 3],
        "top_logprobs": [None, {"i": -ord("i") / 4}, {"H": -ord("H") / 4}, {"e": -ord("e") / 4}],
    }


@pytest.mark.parametrize("prompt", [["ab", "c"], [[97, 98], [99]]])
async def test_each_choice_echoes_its_prompt_streamed_or_not(make_http, prompt):
    http = await make_http()
    options = {"prompt": prompt, "n": 2, "echo": True, "logprobs": 1}
    whole = (await post(http, **options)).json()["choices"]
    assert [choice["text"] for choice in whole] == [f"{p}Hello world {n}" for p in ("ab", "c") for n in range(2)]
    chunks = await stream(http, **options)
    for choice in whole:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


async def test_echo_alone_scores_nothing(make_http):
    client = FakeClient()
    (choice,) = (await post(await make_http(client), echo=True)).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("Hi" + HELLO, None)
    assert client.requests[0].params.num_prompt_logprobs is None


async def test_a_prompt_is_scored_without_an_answer(make_http):
    body = (await post(await make_http(), echo=True, logprobs=2, max_tokens=0)).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("Hi", "length", ["H", "i"])
    assert body["usage"]["completion_tokens"] == 0


async def test_tokens_behind_a_stop_string_are_left_out(make_http):
    for is_streamed in (False, True):
        http = await make_http()
        options = {"stop": "wo", "logprobs": 0}
        if is_streamed:
            chunks = await stream(http, **options)
            tokens = [token for chunk in chunks for choice in chunk["choices"] for token in choice["logprobs"]["tokens"]]
        else:
            tokens = (await post(http, **options)).json()["choices"][0]["logprobs"]["tokens"]
        assert tokens == [*"Hello wo"]


async def test_special_tokens_take_no_place_in_the_text(make_http):
    (choice,) = (await post(await make_http(), prompt=[EOS, 72, 105], echo=True, logprobs=0, max_tokens=1)).json()["choices"]
    assert choice["text"] == "HiH"
    assert choice["logprobs"]["tokens"] == ["</s>", "H", "i", "H"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


async def test_special_tokens_that_a_prompt_spells_take_their_place(make_http):
    class Spelling(FakeText):
        def encode(self, text, *, add_special_tokens=True):
            return [EOS if part == "</s>" else ord(part) for part in re.split("(</s>)|", text) if part]

    http = await make_http(text=Spelling())
    (choice,) = (await post(http, prompt="a</s>b", echo=True, logprobs=0, max_tokens=1)).json()["choices"]
    assert choice["text"] == "a</s>bH"
    assert choice["logprobs"]["tokens"] == ["a", "</s>", "b", "H"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 5, 6]
