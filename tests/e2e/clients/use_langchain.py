"""LangChain: invoke, stream, batch, tools, structured output, and the Responses API. Arguments: URL and model."""

import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, model = sys.argv[1:]
SERVER = {"base_url": f"{url}/v1", "api_key": "unused", "model": model, "max_retries": 0}
llm = ChatOpenAI(**SERVER, temperature=0, max_tokens=24, stream_usage=True)
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Japan": "Tokyo", "Spain": "Madrid"}


def question(country):
    return [("system", "Answer in one short sentence."), ("human", f"What is the capital of {country}?")]


answer = llm.invoke(question("France"))
assert "Paris" in answer.content, answer
assert answer.usage_metadata["output_tokens"] > 1, answer.usage_metadata
assert answer.response_metadata["finish_reason"] == "stop", answer.response_metadata
assert answer.response_metadata["model_name"] == model, answer.response_metadata

chunks = list(llm.stream(question("France")))
whole = sum(chunks[1:], chunks[0])
assert whole.content == answer.content, (whole, answer)
assert len(chunks) > 2, chunks
assert whole.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"], whole.usage_metadata

answers = llm.batch([question(country) for country in CAPITALS])
for capital, answer in zip(CAPITALS.values(), answers, strict=True):
    assert capital in answer.content, answer

scored = llm.bind(logprobs=True, top_logprobs=2).invoke(question("France"))
tokens = scored.response_metadata["logprobs"]["content"]
assert "".join(token["token"] for token in tokens).startswith(scored.content), tokens
assert all(len(token["top_logprobs"]) == 2 for token in tokens), tokens


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""


caller = llm.bind_tools([get_weather])
request = "What is the weather in Paris right now? Use the tool."
called = caller.invoke(request)
(call,) = called.tool_calls
assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"}), call
chunks = list(caller.stream(request))
(streamed,) = sum(chunks[1:], chunks[0]).tool_calls
assert (streamed["name"], streamed["args"]) == (call["name"], call["args"]), streamed


class Capital(BaseModel):
    country: str
    capital: str


for method in ("json_schema", "function_calling"):
    form = ChatOpenAI(**SERVER, temperature=0, max_tokens=40).with_structured_output(Capital, method=method)
    assert form.invoke("What is the capital of France?").capital == "Paris"

items = ChatOpenAI(**SERVER, temperature=0, max_tokens=24, use_responses_api=True)
answer = items.invoke(question("France"))
assert "Paris" in answer.text, answer
chunks = list(items.stream(question("France")))
assert sum(chunks[1:], chunks[0]).text == answer.text, chunks
