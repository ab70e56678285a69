"""LiteLLM: completion, streaming, async, text completion, tools, structured output, errors. Arguments: URL and model."""

import asyncio
import sys

import litellm
from pydantic import BaseModel

url, model = sys.argv[1:]
SERVER = {"api_base": f"{url}/v1", "api_key": "unused", "max_retries": 0}
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
OPTIONS = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}

# the same server by the two names that people give it
for provider in ("openai", "hosted_vllm"):
    answer = litellm.completion(model=f"{provider}/{model}", **OPTIONS, **SERVER)
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.choices[0].finish_reason == "stop", answer
    assert answer.usage.completion_tokens > 1, answer

    chunks = list(
        litellm.completion(model=f"{provider}/{model}", stream=True, stream_options={"include_usage": True}, **OPTIONS, **SERVER)
    )
    whole = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert whole.choices[0].message.content == answer.choices[0].message.content, whole
    assert whole.usage.completion_tokens == answer.usage.completion_tokens, whole


async def ask_several():
    calls = (litellm.acompletion(model=f"openai/{model}", **OPTIONS, **SERVER) for _ in range(3))
    for other in await asyncio.gather(*calls):
        assert "Paris" in other.choices[0].message.content, other
    text = ""
    async for chunk in await litellm.acompletion(model=f"openai/{model}", stream=True, **OPTIONS, **SERVER):
        text += chunk.choices[0].delta.content or ""
    assert "Paris" in text, text


asyncio.run(ask_several())

completion = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=8, **SERVER
)
assert completion.choices[0].text.startswith(" 6, 7"), completion

weather = {
    "name": "get_weather",
    "description": "Get the current weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
called = litellm.completion(
    model=f"hosted_vllm/{model}",
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    tools=[{"type": "function", "function": weather}],
    temperature=0,
    max_tokens=40,
    **SERVER,
)
assert called.choices[0].finish_reason == "tool_calls", called
assert called.choices[0].message.tool_calls[0].function.name == "get_weather", called


class Capital(BaseModel):
    country: str
    capital: str


formed = litellm.completion(model=f"hosted_vllm/{model}", response_format=Capital, **{**OPTIONS, "max_tokens": 40}, **SERVER)
assert Capital.model_validate_json(formed.choices[0].message.content).capital == "Paris", formed

# Its routers send what is too long to a model with more room.
try:
    litellm.completion(model=f"openai/{model}", messages=MESSAGES, max_tokens=10_000_000, **SERVER)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a context that is too long went unnoticed")
