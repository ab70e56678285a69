"""LangChain: invoke, stream, batch. Arguments: the server's URL, the model's name."""

import sys

from langchain_openai import ChatOpenAI

url, model = sys.argv[1:]
llm = ChatOpenAI(
    base_url=f"{url}/v1", api_key="unused", model=model, temperature=0, max_tokens=24, max_retries=0, stream_usage=True
)
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
