"""What an answer says about its own speed and speculation, in the shape and by the rules that load generators check."""

from __future__ import annotations

import pytest

from medusa_core.outputs import TokenDelta
from server.record import RequestRecord
from tests.server.fakes import FakeClient
from tests.server.test_completions import post, stream

MESSAGES = [{"role": "user", "content": "Hi"}]


def check(speculation, deltas, num_tokens):
    drafted = [delta for delta in deltas if delta.num_draft_nodes]
    histogram = speculation["acceptance_histogram"]
    assert sum(histogram) == speculation["num_spec_steps"] == len(drafted)
    accepted = sum(length * count for length, count in enumerate(histogram))
    assert accepted == speculation["num_accepted_draft_tokens"] <= speculation["num_draft_tokens"]
    assert speculation["num_draft_tokens"] == sum(delta.draft_depth for delta in drafted)
    assert speculation["num_spec_tokens"] == len(histogram) - 1
    assert speculation["mean_acceptance_length"] == pytest.approx(1 + accepted / len(drafted), abs=1e-4)
    assert speculation["draft_acceptance_rate"] == pytest.approx(accepted / speculation["num_draft_tokens"], abs=1e-4)
    # the first token belongs to no step, each other to an accepted draft or to the end of a step
    assert num_tokens - 1 <= accepted + len(drafted)


async def test_a_whole_answer_tells_what_speculation_did(make_http):
    client = FakeClient(step_s=0.002)
    for path, body in (("completions", {"prompt": "Hi"}), ("chat/completions", {"messages": MESSAGES})):
        client.deltas.clear()
        answer = (await (await make_http(client)).post(f"/v1/{path}", json={"model": "tiny", **body})).json()
        metrics, num_tokens = answer["metrics"], answer["usage"]["completion_tokens"]
        check(metrics["speculative_decoding"], client.deltas, num_tokens)
        assert metrics["speculative_decoding"]["num_accepted_draft_tokens"] > 0
        assert metrics["time_to_first_token_ms"] > 0
        assert metrics["generation_time_ms"] > 0
        assert metrics["mean_itl_ms"] == pytest.approx(metrics["generation_time_ms"] / (num_tokens - 1), abs=2e-3)
        total_ms = metrics["time_to_first_token_ms"] + metrics["generation_time_ms"]
        assert metrics["tokens_per_second"] == pytest.approx(1e3 * num_tokens / total_ms, rel=1e-2)


async def test_a_stream_tells_with_its_usage(make_http):
    client = FakeClient()
    chunks = await stream(await make_http(client), stream_options={"include_usage": True})
    assert all("metrics" not in chunk for chunk in chunks[:-1])
    check(chunks[-1]["metrics"]["speculative_decoding"], client.deltas, chunks[-1]["usage"]["completion_tokens"])
    assert all("metrics" not in chunk for chunk in await stream(await make_http(client)))


async def test_several_choices_have_none(make_http):
    assert (await post(await make_http(), n=2)).json()["metrics"] is None


async def test_tokens_behind_a_stop_string_are_not_counted(make_http):
    client = FakeClient()
    answer = (await post(await make_http(client), stop="wo")).json()
    speculation = answer["metrics"]["speculative_decoding"]
    num_accepted = speculation["num_accepted_draft_tokens"]
    assert num_accepted + speculation["num_spec_steps"] >= answer["usage"]["completion_tokens"] - 1
    assert num_accepted < sum(delta.num_accepted for delta in client.deltas)


def test_plain_steps_are_no_speculation():
    record = RequestRecord(arrival_s=1.0, max_depth=3)
    record.add(TokenDelta(request_id="a", choice_idx=0, token_ids=[5], is_first=True, queue_s=0.25), num_kept=1, now_s=1.5)
    assert record.metrics.mean_itl_ms is None
    record.add(TokenDelta(request_id="a", choice_idx=0, token_ids=[6]), num_kept=1, now_s=2.0)
    metrics = record.metrics
    assert (metrics.time_to_first_token_ms, metrics.queue_time_ms, metrics.generation_time_ms) == (500.0, 250.0, 500.0)
    assert (metrics.mean_itl_ms, metrics.tokens_per_second) == (500.0, 2.0)
    assert metrics.speculative_decoding is None
