"""Pydantic AI: a text, whole and streamed. Arguments: the server's URL, the model's name."""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, model = sys.argv[1:]
agent = Agent(
    OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="unused")),
    instructions="Answer in one short sentence.",
    model_settings={"temperature": 0, "max_tokens": 24},
)
QUESTION = "What is the capital of France?"

answer = agent.run_sync(QUESTION)
assert "Paris" in answer.output, answer
# The first exchange is sent along.
again = agent.run_sync("And of Germany?", message_history=answer.all_messages())
assert "Berlin" in again.output, again


async def stream():
    async with agent.run_stream(QUESTION) as result:
        texts = [text async for text in result.stream_text(delta=True)]
    assert len(texts) > 1, texts
    assert "".join(texts) == answer.output, texts


asyncio.run(stream())
