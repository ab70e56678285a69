"""What /metrics says agrees with what clients got and with the engine's own records."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from medusa_core.outputs import EngineStats
from server.metrics import render
from server.metrics.collectors import TokenCounter, TokenHistogram, TokenRate
from tests.server.fakes import FakeClient
from tests.server.metric_page import scrape

RELIED_ON = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "tree_size",
    "tokens_per_second",
    "prompt_tokens_total",
    "generation_tokens_total",
    "discarded_tokens_total",
    "plain_steps_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
    "spec_decode_num_tree_nodes_total",
    "request_success_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "acceptance_length_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
]


async def run_requests(http):
    bodies = [
        {"max_tokens": 40},
        {"max_tokens": 7, "n": 2},
        {"max_tokens": 40, "stop": "wor", "n": 2},
        {"max_tokens": 40, "speculative": {"enabled": False}},
        {"max_tokens": 40, "prompt": ["a", "bc"]},
        {"max_tokens": 1},
    ]
    requests = (http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", **body}) for body in bodies)
    responses = await asyncio.gather(*requests)
    return [response.json()["usage"] for response in responses]


async def test_counters_agree_with_usage_and_with_the_engines_deltas(make_http):
    client = FakeClient()
    http = await make_http(client)
    usages = await run_requests(http)
    values = await scrape(http)
    assert values["medusa_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    generated = values["medusa_generation_tokens_total"]
    assert generated == sum(usage["completion_tokens"] for usage in usages)
    assert values["medusa_discarded_tokens_total"] >= 1
    assert generated + values["medusa_discarded_tokens_total"] == sum(len(delta.token_ids) for delta in client.deltas)
    num_choices = 9
    assert values["medusa_request_success_total"] == num_choices
    assert values["medusa_time_to_first_token_seconds_count"] == num_choices
    assert values["medusa_request_queue_time_seconds_count"] == num_choices
    assert values["medusa_e2e_request_latency_seconds_count"] == num_choices
    # Once per token, except the first of each choice.
    assert values["medusa_inter_token_latency_seconds_count"] == generated - num_choices


async def test_speculation_counters_agree_with_each_other(make_http):
    client = FakeClient()
    http = await make_http(client)
    await run_requests(http)
    values = await scrape(http)
    drafts = values["medusa_spec_decode_num_drafts_total"]
    accepted = values["medusa_spec_decode_num_accepted_tokens_total"]
    assert drafts > 0
    assert values["medusa_spec_decode_num_draft_tokens_total"] == 3 * drafts
    assert values["medusa_spec_decode_num_tree_nodes_total"] == 15 * drafts
    assert values["medusa_spec_decode_num_accepted_tokens_per_pos_total"] == accepted
    assert values["medusa_spec_decode_num_accepted_tokens_per_pos_total", "position", "0"] == drafts
    assert values["medusa_acceptance_length_count"] == drafts
    assert values["medusa_plain_steps_total"] == 5
    # Every token is a choice's first, one of the 13 others of the request without speculation, or part of a draft step.
    first_tokens = values["medusa_time_to_first_token_seconds_count"]
    assert values["medusa_generation_tokens_total"] == first_tokens + 13 + values["medusa_acceptance_length_sum"]
    assert accepted <= values["medusa_acceptance_length_sum"] <= accepted + drafts


async def test_acceptance_length_buckets_cover_one_to_depth_plus_one(make_http):
    http = await make_http()
    await run_requests(http)
    text = (await http.get("/metrics")).text
    bounds = re.findall(r'medusa_acceptance_length_bucket{le="(.*?)"', text)
    assert bounds == ["1.0", "2.0", "3.0", "4.0", "+Inf"]


async def test_names_that_dashboards_rely_on_exist_before_the_first_request(make_http):
    values = await scrape(await make_http())
    for name in RELIED_ON:
        assert (f"medusa_{name}", "model_name", "tiny") in values


async def test_engine_gauges_show_the_latest_snapshot(make_http):
    client = FakeClient(stats=EngineStats(num_running=3, num_waiting=4, num_blocks_used=25, num_blocks=100, tree_size=16))
    http = await make_http(client)
    values = await scrape(http)
    assert values["medusa_num_requests_running"] == 3
    assert values["medusa_num_requests_waiting"] == 4
    assert values["medusa_kv_cache_usage_perc"] == 0.25
    assert values["medusa_tree_size"] == 16
    client.is_alive = False
    assert (await scrape(http))["medusa_num_requests_running"] == 0


def test_token_rate_covers_ten_seconds():
    now = [100.0]
    rate = TokenRate(lambda: now[0])
    for _ in range(5):
        rate.add(4)
        now[0] += 1
    assert rate.per_second() == pytest.approx(2.0)
    now[0] += 20
    assert rate.per_second() == 0


async def test_http_requests_are_counted_by_route_and_not_by_path(make_http):
    http = await make_http()
    await http.get("/v1/models/a")
    await http.get("/v1/models/b")
    await http.get("/x1")
    await http.get("/x2")
    await http.get("/docs")
    await http.request("BREW", "/x3")
    values = await scrape(http)
    assert values["medusa_http_requests_total", "route", "/v1/models/{name:path}"] == 2
    assert values["medusa_http_requests_total", "route", "unmatched"] == 3
    assert values["medusa_http_requests_total", "route", "/docs"] == 1
    assert values["medusa_http_requests_total", "method", "OTHER"] == 1
    assert values["medusa_http_requests_total", "status", "404"] == 5
    assert values["medusa_http_request_duration_seconds_count", "route", "unmatched"] == 3


async def test_two_apps_in_a_process_count_apart(make_http):
    first, second = await make_http(), await make_http()
    await run_requests(first)
    assert (await scrape(first))["medusa_generation_tokens_total"] > 0
    assert (await scrape(second))["medusa_generation_tokens_total"] == 0


def test_a_token_histogram_says_what_the_librarys_own_would():
    buckets = (0.125, 0.5, 2.0)
    registries = [CollectorRegistry(), CollectorRegistry()]
    theirs = Histogram("h", "Help.", ("label",), registry=registries[0], buckets=buckets).labels("x")
    ours = TokenHistogram("h", "Help.", {"label": "x"}, registries[1], bounds=buckets)
    # On a bound, between bounds and beyond them; twice, as a scrape must not change what the next one says.
    for value, times in [(0.25, 3), (0.125, 1), (0.0625, 2), (0.5, 4), (2.0, 1), (1024.0, 2)]:
        ours.observe(value, times=times)
        for _ in range(times):
            theirs.observe(value)
        assert render(registries[0].collect()) == render(registries[1].collect())


def test_a_token_counter_says_what_the_librarys_own_would():
    registries = [CollectorRegistry(), CollectorRegistry()]
    theirs = Counter("c", "Help.", ("one", "two"), registry=registries[0])
    ours = TokenCounter("c", "Help.", ("one", "two"), registries[1])
    for values, amount in [(("a", "b"), 3), (("a", "c"), 0), (("a", "b"), 4)]:
        theirs.labels(*values).inc(amount)
        ours.labels(*values).value += amount
        assert render(registries[0].collect()) == render(registries[1].collect())


async def test_requests_are_open_from_the_engine_s_taking_them_to_their_end(make_server):
    client = FakeClient(gate=asyncio.Event(), num_free_steps=1)
    url = await make_server(client)
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        assert (await scrape(http))["medusa_open_requests"] == 0
        body = {"model": "tiny", "prompt": "Hi", "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as running:
            await running.aiter_bytes().__anext__()
            assert (await scrape(http))["medusa_open_requests"] == 1
        while (await scrape(http))["medusa_open_requests"]:
            await asyncio.sleep(0.01)
        refused = await http.post("/v1/completions", json={**body, "max_tokens": -1})
        assert refused.status_code == 400
        assert (await scrape(http))["medusa_open_requests"] == 0
