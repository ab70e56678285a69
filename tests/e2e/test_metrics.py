"""The live /metrics: counters that agree with the answers and with each other, gauges that return to rest."""

from __future__ import annotations

import pytest

from tests.e2e.server_process import MODEL, Scrape, Server, until

pytestmark = pytest.mark.demo


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


def test_token_counters_agree_with_usage(server: Server):
    before = server.until_idle()
    answers = [
        server.complete("def fibonacci(n):\n", max_tokens=40),
        server.complete("1, 2, 3, 4, 5, 6,", max_tokens=40, stop="9"),
        server.complete("The", max_tokens=12, n=2, temperature=1.0, ignore_eos=True),
    ]
    after = server.until_idle()
    assert grown(before, after, "generation_tokens_total") == sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert grown(before, after, "prompt_tokens_total") == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert grown(before, after, "request_success_total", finished_reason="stop") == 1
    assert grown(before, after, "request_success_total", finished_reason="length") == 3
    assert grown(before, after, "time_to_first_token_seconds_count") == 4
    assert grown(before, after, "e2e_request_latency_seconds_count") == 4
    assert after.value("tokens_per_second") > 0


def test_speculation_counters_agree_with_each_other(server: Server):
    before = server.until_idle()
    usage = server.complete("def fibonacci(n):\n", max_tokens=48)["usage"]
    after = server.until_idle()
    drafts = grown(before, after, "spec_decode_num_drafts_total")
    accepted = grown(before, after, "spec_decode_num_accepted_tokens_total")
    plain_steps = grown(before, after, "plain_steps_total")
    assert drafts > 0
    assert 0 < accepted <= grown(before, after, "spec_decode_num_draft_tokens_total")
    assert accepted == grown(before, after, "spec_decode_num_accepted_tokens_per_pos_total")
    assert grown(before, after, "spec_decode_num_tree_nodes_total") >= drafts
    assert grown(before, after, "acceptance_length_count") == drafts
    # The first token comes from the prompt; a plain step gives one; the rest is what the drafts kept.
    assert grown(before, after, "acceptance_length_sum") == usage["completion_tokens"] - 1 - plain_steps
    per_position = [grown(before, after, "spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(3)]
    assert per_position == sorted(per_position, reverse=True)
    assert drafts >= per_position[0] > 0
    # Nothing was trimmed, so the engine counts as many, and knows who offered them.
    assert grown(before, after, "spec_decode_accepted_by_source_total") == accepted
    by_heads = grown(before, after, "spec_decode_accepted_by_source_total", source="head")
    assert grown(before, after, "spec_decode_head_hits_total") == by_heads > 0
    decode_steps = grown(before, after, "decode_steps_by_tree_size_total")
    assert grown(before, after, "decode_steps_by_tree_size_total", nodes="8") == decode_steps == drafts + plain_steps
    # The prompt was a step of its own.
    assert grown(before, after, "step_latency_seconds_count") == grown(before, after, "engine_steps_total") == decode_steps + 1


def test_requests_without_speculation_draft_nothing(server: Server):
    before = server.until_idle()
    usage = server.complete("def fibonacci(n):\n", max_tokens=12, speculative={"enabled": False})["usage"]
    after = server.until_idle()
    assert grown(before, after, "spec_decode_num_drafts_total") == 0
    assert grown(before, after, "plain_steps_total") == usage["completion_tokens"] - 1
    assert after.value("tree_size") == 1


def test_a_prompt_seen_before_hits_the_prefix_cache(server: Server):
    prompt = "Blocks of sixteen tokens are kept: " + ", ".join(f"item {i}" for i in range(30))
    server.complete(prompt, max_tokens=1)
    before = server.until_idle()
    again = server.complete(prompt, max_tokens=1)["usage"]
    after = server.until_idle()
    cached = again["prompt_tokens_details"]["cached_tokens"]
    assert again["prompt_tokens"] > cached >= again["prompt_tokens"] - 17
    assert grown(before, after, "prefix_cache_hits_total") == cached
    assert grown(before, after, "prefix_cache_queries_total") == again["prompt_tokens"]


def test_a_client_that_leaves_frees_what_it_held(server: Server):
    before = server.until_idle()
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 20_000, "ignore_eos": True, "stream": True, "n": 2}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        busy = until(lambda: (scrape := server.scrape()).value("num_requests_running") == 2 and scrape)
        assert busy.value("kv_cache_usage_perc") > 0
    after = server.until_idle()
    assert after.value("kv_cache_usage_perc") == 0
    assert grown(before, after, "request_success_total", finished_reason="abort") == 2
