"""`/v1/completions`, streamed and whole."""

from __future__ import annotations

import json

import pytest

from tests.server.fakes import FakeClient


async def post(http, **body):
    return await http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", **body})


async def stream(http, **body):
    """Chunks of a stream, after checking its frames."""
    response = await post(http, stream=True, **body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]"
    assert rest == ""
    assert all(frame.startswith("data: {") and "\n" not in frame for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


async def test_answer_has_the_shape_of_the_api(make_http):
    response = await post(await make_http())
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "text": "Hello world 0", "finish_reason": "stop", "logprobs": None}]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 14,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize("prompt", ["Hi", [72, 105], ["Hi"], [[72, 105]]])
async def test_four_prompt_shapes_mean_the_same(make_http, prompt):
    client = FakeClient()
    response = await post(await make_http(client), prompt=prompt)
    assert response.status_code == 200
    assert [request.prompt_token_ids for request in client.requests] == [[72, 105]]


async def test_choices_are_numbered_prompt_by_prompt(make_http):
    client = FakeClient(answer=lambda request, choice: f"{chr(request.prompt_token_ids[0])}{choice}")
    response = await post(await make_http(client), prompt=["a", "b"], n=2)
    choices = [(choice["index"], choice["text"]) for choice in response.json()["choices"]]
    assert choices == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert response.json()["usage"]["prompt_tokens"] == 2
    assert response.json()["usage"]["completion_tokens"] == 4 * 3


async def test_sixteen_tokens_are_the_default(make_http):
    client = FakeClient(answer=lambda *_: "x" * 100)
    response = await post(await make_http(client))
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.json()["usage"]["completion_tokens"] == 16


async def test_default_length_shrinks_to_the_room_left(make_http):
    client = FakeClient(answer=lambda *_: "x" * 100)
    response = await post(await make_http(client), prompt="p" * 250)
    assert response.json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3},
        {"stop": "wor"},
        {"stop": ["o w", "zzz"], "n": 3},
        {"stop": "lo", "include_stop_str_in_output": True},
        {"prompt": ["ab", "cd"], "n": 2},
        {"prompt": [[1, 2], [3]]},
        {"max_tokens": 5},
        {"stop": "never"},
    ],
)
async def test_stream_equals_the_whole_answer(make_http, extra):
    http = await make_http()
    whole = (await post(http, **extra)).json()
    chunks = await stream(http, stream_options={"include_usage": True}, **extra)
    texts = {}
    reasons = {}
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        assert choice["index"] not in reasons, "nothing comes after a finish reason"
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    assert [(texts[i], reasons[i]) for i in sorted(texts)] == [(c["text"], c["finish_reason"]) for c in whole["choices"]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1


async def test_usage_is_absent_from_a_stream_unless_asked_for(make_http):
    chunks = await stream(await make_http())
    assert all("usage" not in chunk for chunk in chunks)


async def test_stop_string_trims_text_and_usage_and_aborts_only_its_choice(make_http):
    client = FakeClient(answer=lambda _, choice: "one two three" if choice == 0 else "four five six")
    response = await post(await make_http(client), n=2, stop=" two")
    first, second = response.json()["choices"]
    assert (first["text"], first["finish_reason"]) == ("one", "stop")
    assert (second["text"], second["finish_reason"]) == ("four five six", "stop")
    assert client.aborted == [(client.requests[0].request_id, 0)]
    # "one two" is 7 tokens; the step that completed it had brought 3 of which the last was kept; then 13 and EOS.
    assert response.json()["usage"]["completion_tokens"] == len("one two") + len("four five six") + 1


async def test_stop_string_of_the_last_choice_ends_the_answer_without_waiting_for_the_engine(make_http):
    client = FakeClient(answer=lambda *_: "stop here and never end")
    response = await post(await make_http(client), stop="here", max_tokens=50)
    assert response.json()["choices"][0]["text"] == "stop "
    assert client.num_live == 0
    assert len(client.deltas) < 8


async def test_stop_string_wins_over_the_length_limit(make_http):
    response = await post(await make_http(), stop="Hell", max_tokens=4)
    assert response.json()["choices"][0] == {"index": 0, "text": "", "finish_reason": "stop", "logprobs": None}


async def test_sampling_parameters_reach_the_engine(make_http):
    client = FakeClient()
    await post(
        await make_http(client),
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        seed=-5,
        min_tokens=2,
        max_tokens=9,
        stop_token_ids=[65],
        ignore_eos=True,
        priority=3,
        speculative={"enabled": False},
    )
    (request,) = client.requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0, 0.5, 7, 0.1, -5)
    assert (params.min_tokens, params.max_tokens, params.stop_token_ids, params.ignore_eos) == (2, 9, (65,), True)
    assert not params.is_speculation_enabled
    assert request.priority == 3
    assert request.arrival_s > 0


async def test_penalties_and_biases_reach_the_engine(make_http):
    client = FakeClient()
    fields = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"7": -100, "65": 2.5}}
    response = await post(await make_http(client), **fields)
    assert response.status_code == 200
    params = client.requests[0].params
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -1.0, 1.1)
    assert params.logit_bias == ((7, -100.0), (65, 2.5))


async def test_null_means_the_default(make_http):
    client = FakeClient()
    nulls = dict.fromkeys(("max_tokens", "temperature", "top_p", "n", "stream", "stop", "seed", "top_k", "logit_bias", "logprobs"))
    response = await post(await make_http(client), **nulls)
    assert response.status_code == 200
    assert client.requests[0].params.temperature == 1.0
    assert client.requests[0].params.max_tokens == 16


async def test_neutral_values_of_unsupported_fields_pass(make_http):
    neutral = {"logprobs": None, "echo": False, "suffix": "", "best_of": 2, "n": 2, "logit_bias": {}, "presence_penalty": 0.0}
    response = await post(await make_http(), **neutral, frequency_penalty=0, repetition_penalty=1.0, top_k=-1)
    assert response.status_code == 200


async def test_a_suffix_makes_the_prompt_one_that_asks_for_the_middle(make_http):
    client = FakeClient()
    http = await make_http(client)
    answer = (await post(http, prompt="ab", suffix="yz", echo=True)).json()
    assert "".join(map(chr, client.requests[0].prompt_token_ids)) == "<ab|yz>"
    assert answer["usage"]["prompt_tokens"] == 7
    assert answer["choices"][0]["text"] == "abHello world 0"
    assert (await post(http, prompt=["a", ""], suffix="z")).status_code == 200
    assert ["".join(map(chr, request.prompt_token_ids)) for request in client.requests[1:]] == ["<a|z>", "<|z>"]


async def test_characters_are_not_split_by_the_encoding(make_http):
    text = "naïve — 日本 😀"
    client = FakeClient(answer=lambda *_: text)
    chunks = await stream(await make_http(client), max_tokens=40)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
