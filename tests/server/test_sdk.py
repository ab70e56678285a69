"""The OpenAI SDK, validating every answer strictly, against the app on a loopback port."""

from __future__ import annotations

import openai
import pytest

from medusa_core.errors import EngineDeadError, QueueFullError
from tests.server.fakes import FakeClient

MESSAGES = [{"role": "user", "content": "Hi"}]


async def test_chat(make_sdk):
    sdk = await make_sdk()
    answer = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, n=2, seed=1, service_tier="auto")
    assert [choice.message.content for choice in answer.choices] == ["Hello world 0", "Hello world 1"]
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id.startswith("req_")


async def test_chat_stream(make_sdk):
    sdk = await make_sdk()
    options = {"include_usage": True}
    texts = ["", ""]
    usages = []
    async for chunk in await sdk.chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True, stream_options=options):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello world 0", "Hello world 1"]
    assert usages[-1].completion_tokens == 28
    assert not any(usages[:-1])


async def test_chat_stream_helper_accumulates_several_choices(make_sdk):
    sdk = await make_sdk()
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, n=3) as stream:
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == [f"Hello world {index}" for index in range(3)]
    assert {choice.message.role for choice in final.choices} == {"assistant"}


async def test_completions(make_sdk):
    sdk = await make_sdk()
    answer = await sdk.completions.create(model="tiny", prompt=["a", "b"], max_tokens=20)
    assert [choice.index for choice in answer.choices] == [0, 1]


async def test_completions_stream(make_sdk):
    # The SDK's types say that finish_reason is never null in a completion chunk; every server, OpenAI's own too, sends null.
    sdk = await make_sdk(is_strict=False)
    chunks = [chunk async for chunk in await sdk.completions.create(model="tiny", prompt="a", stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello world 0"


async def test_models(make_sdk):
    sdk = await make_sdk(served_model_name=("org/name",))
    assert [model.id async for model in sdk.models.list()] == ["org/name"]
    assert (await sdk.models.retrieve("org/name")).owned_by == "medusa"


async def test_errors_become_the_sdks_classes(make_sdk):
    sdk = await make_sdk()
    with pytest.raises(openai.NotFoundError) as not_found:
        await sdk.chat.completions.create(model="other", messages=MESSAGES)
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    assert not_found.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=1000)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        await (await make_sdk(api_key=("secret",))).models.list()
    with pytest.raises(openai.InternalServerError) as full:
        await (await make_sdk(FakeClient(refusal=QueueFullError("Full.")))).chat.completions.create(model="tiny", messages=MESSAGES)
    assert (full.value.status_code, full.value.code) == (503, "server_overloaded")


async def test_an_error_in_a_stream_is_raised(make_sdk):
    sdk = await make_sdk(FakeClient(failure=EngineDeadError("The worker died."), num_free_steps=2))
    chunks = []

    async def read():
        async for chunk in await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
            chunks.append(chunk)

    with pytest.raises(openai.APIError, match="The worker died"):
        await read()
    assert chunks
