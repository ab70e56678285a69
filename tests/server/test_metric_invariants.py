"""Under mixed traffic, counters agree with what each request was told, with the engine's own deltas, and with each other."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

from medusa_core.errors import QueueFullError
from medusa_core.outputs import EngineStats, FinishReason
from server.record import RequestRecord
from tests.server.fakes import FakeClient
from tests.server.metric_page import is_total, scrape

PROMPT = {"model": "tiny", "prompt": "Hi"}


@pytest.fixture
def records(monkeypatch):
    """The record of every choice."""
    made = []
    init = RequestRecord.__init__

    def keep(self, **arguments):
        init(self, **arguments)
        made.append(self)

    monkeypatch.setattr(RequestRecord, "__init__", keep)
    return made


async def whole(http, **body):
    response = await http.post("/v1/completions", json=PROMPT | body)
    return response.json().get("usage")


async def streamed(http, **body):
    body = PROMPT | {"stream": True, "stream_options": {"include_usage": True}} | body
    text = (await http.post("/v1/completions", json=body)).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    return chunks[-1].get("usage")


async def hung_up(http, client):
    """Three clients that go away while their answers are being made, each of which has come to a few tokens."""
    tasks = [asyncio.create_task(whole(http, prompt="gone", max_tokens=200)) for _ in range(3)]
    lengths = Counter()
    async with asyncio.timeout(20):
        while len(lengths) < len(tasks) or min(lengths.values()) < 9:
            await asyncio.sleep(0.01)
            lengths = Counter(delta.request_id for delta in client.deltas for token in delta.token_ids if token == ord("x"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def mixed_traffic(http, client):
    """Usages of the requests that got an answer."""
    requests = [
        whole(http),
        whole(http, n=3, max_tokens=9),
        whole(http, stop=["wor"], n=2),
        streamed(http, stop="lo"),
        streamed(http, max_tokens=1),
        streamed(http, max_tokens=5, speculative={"enabled": False}),
        whole(http, prompt=["one", "two"], max_tokens=9),
        hung_up(http, client),
        whole(http, max_tokens=-1),
        whole(http, model="other"),
    ]
    return [usage for usage in await asyncio.gather(*requests) if usage is not None]


def long_answer(request, choice_idx):
    return "x" * 150 if request.prompt_token_ids == [ord(c) for c in "gone"] else f"Hello world {choice_idx}"


async def test_counters_are_the_sum_of_what_requests_were_told(make_http, records):
    client = FakeClient(answer=long_answer, step_s=0.02)
    http = await make_http(client)
    usages = await mixed_traffic(http, client)
    page = await scrape(http)
    assert len(usages) == 7
    ended = {
        reason: page["medusa_request_success_total", "finished_reason", reason] for reason in ("stop", "length", "abort", "error")
    }
    # ten choices or prompts that ended, and those of clients that went away
    assert ended["stop"] + ended["length"] == 11
    assert (ended["abort"], ended["error"]) == (3, 0)
    num_choices = sum(ended.values())
    check_tokens(page, client, num_choices=num_choices, num_prompts=11)
    told = sum(usage["completion_tokens"] for usage in usages)
    assert page["medusa_generation_tokens_total"] == sum(record.num_tokens for record in records)
    # Those who went away were told nothing, but their tokens were made.
    assert page["medusa_generation_tokens_total"] > told
    check_speculation(page, records)
    check_times(page, num_choices=num_choices, num_complete=11)
    assert page["medusa_requests_refused_total"] == 2
    assert page["medusa_requests_refused_total", "reason", "invalid_value"] == 1
    assert page["medusa_requests_refused_total", "reason", "model_not_found"] == 1


def check_tokens(page, client, *, num_choices, num_prompts):
    made = sum(len(delta.token_ids) for delta in client.deltas)
    counted = page["medusa_generation_tokens_total"] + page["medusa_discarded_tokens_total"]
    # the last three of each client that went away may have reached nobody
    assert made - 9 <= counted <= made
    assert page["medusa_discarded_tokens_total"] > 0
    assert page["medusa_request_generation_tokens_sum"] == page["medusa_generation_tokens_total"]
    assert page["medusa_request_generation_tokens_count"] == num_choices
    assert page["medusa_request_prompt_tokens_sum"] == page["medusa_prompt_tokens_total"]
    assert page["medusa_request_prompt_tokens_count"] == num_prompts
    # two of each prompt, says the fake engine
    assert page["medusa_prompt_tokens_cached_total"] == 2 * num_prompts


def check_speculation(page, records):
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert page[f"medusa_spec_decode_{name}_total"] == sum(getattr(record, name) for record in records) > 0
    drafts, accepted = page["medusa_spec_decode_num_drafts_total"], page["medusa_spec_decode_num_accepted_tokens_total"]
    per_position = [page["medusa_spec_decode_num_accepted_tokens_per_pos_total", "position", str(at)] for at in range(3)]
    assert sum(per_position) == accepted <= page["medusa_spec_decode_num_draft_tokens_total"] == 3 * drafts
    assert drafts >= per_position[0] >= per_position[1] >= per_position[2]
    assert page["medusa_acceptance_length_count"] == drafts
    # A token is a choice's first, one of a step with drafts, or one of the four others of the request without speculation, and the
    # fake engine emits those in two steps.
    first = page["medusa_time_to_first_token_seconds_count"]
    assert page["medusa_generation_tokens_total"] == first + 4 + page["medusa_acceptance_length_sum"]
    assert page["medusa_plain_steps_total"] == 2
    # Each step with drafts adds a token behind what it accepted, unless it was cut there.
    assert accepted <= page["medusa_acceptance_length_sum"] <= accepted + drafts


def check_times(page, *, num_choices, num_complete):
    def sums(name):
        return page[f"medusa_{name}_seconds_sum"]

    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time"):
        assert page[f"medusa_{name}_seconds_count"] == num_choices
    for name in ("e2e_request_latency", "request_decode_time"):
        assert page[f"medusa_{name}_seconds_count"] == num_complete
    # all but the choice of one token
    assert page["medusa_request_time_per_output_token_seconds_count"] == num_complete - 1
    assert sums("time_to_first_token") == pytest.approx(sums("request_queue_time") + sums("request_prefill_time"))
    # once per token behind a choice's first, those of aborted choices included
    assert page["medusa_inter_token_latency_seconds_count"] == page["medusa_generation_tokens_total"] - num_choices
    assert sums("inter_token_latency") >= sums("request_decode_time") > 0


async def test_records_of_requests_add_up_to_the_speculation_counters(make_http, records):
    http = await make_http(FakeClient())
    await asyncio.gather(whole(http), streamed(http, stop="wo"), streamed(http, max_tokens=4), whole(http, max_tokens=1))
    page = await scrape(http)
    told = [record.metrics.speculative_decoding for record in records]
    told = [speculation for speculation in told if speculation is not None]
    assert len(told) == 3
    for field, name in (
        ("num_spec_steps", "num_drafts"),
        ("num_draft_tokens", "num_draft_tokens"),
        ("num_accepted_draft_tokens", "num_accepted_tokens"),
    ):
        assert page[f"medusa_spec_decode_{name}_total"] == sum(getattr(speculation, field) for speculation in told) > 0
    histogram = Counter()
    for speculation in told:
        histogram.update(dict(enumerate(speculation.acceptance_histogram)))
    per_position = [page["medusa_spec_decode_num_accepted_tokens_per_pos_total", "position", str(at)] for at in range(3)]
    assert per_position == [sum(count for accepted, count in histogram.items() if accepted > at) for at in range(3)]


async def test_choices_that_a_dead_worker_ends_are_errors_and_keep_their_tokens(make_http):
    """And the counts go on where they were when its successor has taken over."""
    client = FakeClient(gate=asyncio.Event(), num_free_steps=2, stats=EngineStats(num_steps_total=20, num_preemptions_total=3))
    http = await make_http(client)
    requests = [asyncio.create_task(http.post("/v1/completions", json=PROMPT | {"n": 2})) for _ in range(2)]
    await asyncio.sleep(0.05)
    before = await scrape(http)
    client.is_alive, client.stats = False, EngineStats()
    client.gate.set()
    assert [(await request).status_code for request in requests] == [500, 500]
    during = await scrape(http)
    assert during["medusa_request_success_total", "finished_reason", "error"] == 4
    assert during["medusa_request_generation_tokens_count"] == 4
    assert during["medusa_request_generation_tokens_sum"] == during["medusa_generation_tokens_total"] == 16
    assert during["medusa_requests_refused_total"] == 0
    client.is_alive, client.stats = True, EngineStats(num_starts=2, num_steps_total=4, num_preemptions_total=1)
    await whole(http)
    after = await scrape(http)
    for earlier, later in ((before, during), (during, after)):
        fallen = [key for key, value in earlier.items() if is_total(key) and later[key] < value]
        assert fallen == []
    assert [page["medusa_num_preemptions_total"] for page in (before, during, after)] == [3, 3, 4]
    assert [page["medusa_engine_steps_total"] for page in (before, during, after)] == [20, 20, 24]
    assert [page["medusa_worker_restarts_total"] for page in (before, during, after)] == [0, 0, 1]


async def test_a_choice_that_the_engine_gives_up_is_an_error(make_http):
    """A grammar that takes too much to follow is the client's, so the request is refused; but its tokens were made."""
    client = FakeClient()
    steps = client._steps

    async def give_up(request):
        async for delta in steps(request):
            yield delta
            yield type(delta)(request_id=request.request_id, choice_idx=0, token_ids=[], finish_reason=FinishReason.GRAMMAR)
            return

    client._steps = give_up
    http = await make_http(client)
    body = PROMPT | {"response_format": {"type": "json_object"}}
    assert (await http.post("/v1/completions", json=body)).status_code == 400
    page = await scrape(http)
    assert page["medusa_request_success_total", "finished_reason", "error"] == 1
    assert page["medusa_request_generation_tokens_sum"] == page["medusa_generation_tokens_total"] == 1


async def test_a_request_that_never_ran_is_refused_and_no_outcome(make_http):
    http = await make_http(FakeClient(refusal=QueueFullError("The queue is full.")))
    for body in ({}, {"stream": True}, {"n": 2}):
        assert (await http.post("/v1/completions", json=PROMPT | body)).status_code == 503
    page = await scrape(http)
    assert page["medusa_requests_refused_total", "reason", QueueFullError.code] == 3
    assert page["medusa_request_success_total"] == 0
    assert page["medusa_request_prompt_tokens_count"] == 0
