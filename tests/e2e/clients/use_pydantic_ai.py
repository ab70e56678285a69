"""Pydantic AI: a text, whole and streamed, a tool, structured output, and the Responses API. Arguments: URL and model."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

url, model = sys.argv[1:]
provider = OpenAIProvider(base_url=f"{url}/v1", api_key="unused")
SETTINGS = {"temperature": 0, "max_tokens": 24}
INSTRUCTIONS = "Answer in one short sentence."
agent = Agent(OpenAIChatModel(model, provider=provider), instructions=INSTRUCTIONS, model_settings=SETTINGS)
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

items = Agent(OpenAIResponsesModel(model, provider=provider), instructions=INSTRUCTIONS, model_settings=SETTINGS)
assert "Paris" in items.run_sync(QUESTION).output


class Capital(BaseModel):
    country: str
    capital: str


# by the form of the text, and by a call that is demanded
for form in (NativeOutput(Capital), ToolOutput(Capital)):
    former = Agent(OpenAIChatModel(model, provider=provider), output_type=form, model_settings={**SETTINGS, "max_tokens": 40})
    assert former.run_sync(QUESTION).output.capital == "Paris"

cities = []


async def once(context, definition):
    """A model as small as this one would call again and again; nor does it always make sense of the result."""
    return None if cities else definition


caller = Agent(OpenAIChatModel(model, provider=provider), model_settings=SETTINGS)


@caller.tool_plain(prepare=once)
def get_current_weather(city: str) -> str:
    """Get the current weather in a city."""
    cities.append(city)
    return "cloudy, 21 degrees"


told = caller.run_sync("What is the weather in Paris?")
assert cities == ["Paris"], cities
assert told.output, told
