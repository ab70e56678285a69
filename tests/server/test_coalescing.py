"""A front end that is behind sends fewer and longer frames; nothing else changes."""

from __future__ import annotations

import json

import pytest

from medusa_core.errors import EngineDeadError
from tests.server.fakes import FakeClient
from tests.server.metric_page import scrape

BODY = {"model": "tiny", "stream": True, "max_tokens": 60, "stream_options": {"include_usage": True}}
TIMES = ("_seconds", "_created", "tokens_per_second")


async def run(make_http, batch_size, extra, **client_options):
    """What a client can tell apart: frames, and by choice the text and the finish reason; usage; counters by name."""
    client = FakeClient(answer=lambda _, choice: f"{choice}: the quick brown fox", batch_size=batch_size, **client_options)
    http = await make_http(client)
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    path, prompt = ("chat/completions", chat) if extra.pop("is_chat", False) else ("completions", {"prompt": ["Hi", "Ho"]})
    response = await http.post(f"/v1/{path}", json=BODY | prompt | extra)
    *frames, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(frame[6:]) for frame in frames]
    texts, reasons = {}, {}
    for choice in (choice for chunk in chunks for choice in chunk.get("choices", ())):
        index = choice["index"]
        assert index not in reasons, "a frame after the last one of its choice"
        text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        texts[index] = texts.get(index, "") + text
        if choice["finish_reason"] is not None:
            reasons[index] = choice["finish_reason"]
    counters = {
        name: value
        for name, value in (await scrape(http)).items()
        if isinstance(name, str) and (name.endswith("_count") or not any(part in name for part in TIMES))
    }
    return len(frames), texts, reasons, chunks[-1].get("usage"), chunks[-1].get("error"), counters


@pytest.mark.parametrize(
    "extra",
    [{}, {"n": 3}, {"is_chat": True, "n": 2}, {"stop": "ow"}, {"n": 2, "max_tokens": 9}, {"speculative": {"enabled": False}}],
    ids=str,
)
async def test_steps_in_one_frame_give_the_same_text_usage_and_counters(make_http, extra):
    one_by_one = await run(make_http, 1, dict(extra))
    for batch_size in (20, 1000):
        together = await run(make_http, batch_size, dict(extra))
        assert together[0] < one_by_one[0]
        # What the engine ran past a stop string before it was told depends on when it was told.
        for counters in (one_by_one[-1], together[-1]):
            counters.pop("medusa_discarded_tokens_total", None)
        assert together[1:] == one_by_one[1:]


async def test_all_that_came_before_an_engine_was_lost_is_sent(make_http):
    lost = {"failure": EngineDeadError("The worker died."), "num_free_steps": 4}
    one_by_one = await run(make_http, 1, {}, **lost)
    together = await run(make_http, 1000, {}, **lost)
    assert together[1:5] == one_by_one[1:5]
    assert one_by_one[4]["code"] == "engine_dead"
    assert len(together[1][0]) > 5
