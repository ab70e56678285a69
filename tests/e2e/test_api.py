"""What people do with the server: chat and completions with the OpenAI SDK, streamed and whole, several at once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.server_process import MODEL, Server

pytestmark = pytest.mark.demo

# Hardly any choice of words: in sixteen bits a near-tie could fall either way from one request to the next.
REPEAT = [{"role": "user", "content": "Repeat exactly this sentence: The quick brown fox jumps over the lazy dog."}]
COUNT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "England": "London",
    "Russia": "Moscow",
    "China": "Beijing",
}


def capital_of(country: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the capital of {country}? Answer in one short sentence."}]


def test_models(server: Server):
    assert [model.id for model in server.sdk().models.list()] == [MODEL]


def test_chat_streamed_and_whole_are_equal(server: Server):
    sdk = server.sdk()
    options = {"model": MODEL, "messages": REPEAT, "temperature": 0, "max_tokens": 24}
    whole = sdk.chat.completions.create(**options)
    chunks = list(sdk.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert "quick brown fox" in text
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == whole.choices[0].finish_reason == "stop"
    usages = [chunk.usage for chunk in chunks]
    assert usages[-1].completion_tokens == whole.usage.completion_tokens
    assert usages[-1].prompt_tokens == whole.usage.prompt_tokens
    assert not any(usages[:-1])
    assert chunks[-1].choices == []


def test_completions_streamed_and_whole_are_equal(server: Server):
    whole = server.sdk().completions.create(model=MODEL, prompt=COUNT, temperature=0, max_tokens=24)
    # The SDK's types forbid the null finish_reason that every server sends in completion chunks.
    stream = server.sdk(is_strict=False).completions.create(model=MODEL, prompt=COUNT, temperature=0, max_tokens=24, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.choices[0].text.startswith(" 13, 14, 15,")
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"


def test_four_prompt_shapes(server: Server):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    sdk = server.sdk()
    ids = [16, 11, 220, 17, 11, 220, 18, 11]  # "1, 2, 3,"
    prompts = ["1, 2, 3,", ids, ["1, 2, 3,", "2, 4, 6,"], [ids, [*ids, 220, 19, 11]]]
    answers = [sdk.completions.create(prompt=prompt, **options) for prompt in prompts]
    text, by_ids, both, both_by_ids = ([choice.text for choice in answer.choices] for answer in answers)
    assert text == by_ids == both[:1] == both_by_ids[:1] == [" 4, 5, 6"[: len(text[0])]]
    assert both[1].startswith(" 8,")
    assert both_by_ids[1].startswith(" 5,")
    assert answers[0].usage.prompt_tokens == len(ids)
    assert answers[2].usage.prompt_tokens == 2 * len(ids)


def test_several_choices_with_a_seed(server: Server):
    options = {"model": MODEL, "prompt": "My favourite animal is", "temperature": 1.5, "seed": 11, "max_tokens": 12}
    server.sdk().completions.create(**options)  # from here on its prompt is in the prefix cache for all alike
    one = server.sdk().completions.create(**options)
    same = server.sdk().completions.create(**options)
    two = server.sdk().completions.create(**options, n=2)
    other = server.sdk().completions.create(**{**options, "seed": 12})
    assert one.choices[0].text == same.choices[0].text
    assert one.choices[0].text != other.choices[0].text
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text != two.choices[1].text
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens == 24


def test_stop_strings_end_the_text_before_them(server: Server):
    free = server.complete(COUNT, max_tokens=40)
    stopped = server.complete(COUNT, max_tokens=40, stop=["nowhere", "16"])
    assert "16" in free["choices"][0]["text"]
    assert stopped["choices"][0] == {"index": 0, "text": " 13, 14, 15, ", "finish_reason": "stop", "logprobs": None}
    assert stopped["usage"]["completion_tokens"] < free["usage"]["completion_tokens"]
    kept = server.complete(COUNT, max_tokens=40, stop="16", include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == " 13, 14, 15, 16"


def test_eight_streams_at_once_get_their_own_good_answers(server: Server):
    sdk = server.sdk()

    def ask(country: str) -> tuple[str, str | None]:
        stream = sdk.chat.completions.create(model=MODEL, messages=capital_of(country), temperature=0, max_tokens=24, stream=True)
        choices = [choice for chunk in stream for choice in chunk.choices]
        return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason

    with ThreadPoolExecutor(len(CAPITALS)) as pool:
        answers = dict(zip(CAPITALS, pool.map(ask, CAPITALS), strict=True))
    assert {country: capital for country, capital in CAPITALS.items() if capital not in answers[country][0]} == {}
    assert {reason for _, reason in answers.values()} == {"stop"}


def test_a_stream_is_sse_and_ends_with_done(server: Server):
    body = {"model": MODEL, "messages": capital_of("France"), "stream": True, "max_tokens": 8, "temperature": 0}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_sampling_parameters_are_obeyed(server: Server):
    # A text without close calls: bfloat16 logits tie, and all of a tie survives a filter.
    forced = server.complete(COUNT, temperature=2.0, top_k=1, seed=1, max_tokens=8)
    nucleus = server.complete(COUNT, temperature=2.0, top_p=1e-6, seed=2, max_tokens=8)
    greedy = server.complete(COUNT, max_tokens=8)
    assert forced["choices"] == nucleus["choices"] == greedy["choices"]
    long = server.complete("Answer: yes<|im_end|>", max_tokens=16, ignore_eos=True)
    assert long["usage"]["completion_tokens"] == 16


def test_a_suffix_is_led_up_to(server: Server):
    middle = server.text("def add(first, second):\n    return ", suffix="\n\n\nprint(add(1, 2))\n", max_tokens=16)
    assert middle.strip().startswith("first + second")
