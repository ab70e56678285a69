"""What the engine tells of itself, from its snapshots: totals that outlive it, and labels from its description."""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import signal

import httpx
import msgspec
import pytest
import torch
import transformers
from prometheus_client import CollectorRegistry

from medusa_core import __version__
from medusa_core.errors import MedusaError
from medusa_core.outputs import STEP_LATENCY_BOUNDS_S, EngineStats
from server.app import create_app
from server.errors import answer_for, is_refusal, refusal_codes
from server.metrics import EngineMetrics
from server.settings import ServerSettings
from tests.engine.harness import make_config, make_worker_client, until
from tests.server.fakes import INFO, FakeClient, FakeText
from tests.server.metric_page import is_total, scrape

RANKS = ((1, 0), (1, 1), (2, 0))
WITH_TREE = msgspec.structs.replace(INFO, tree_sizes=(1, 4, 8), head_ranks=RANKS)


class Page:
    def __init__(self, info=WITH_TREE):
        self.registry = CollectorRegistry()
        self.metrics = EngineMetrics(self.registry, model_name="m", info=info)

    def __call__(self, name, **labels):
        return self.registry.get_sample_value(f"medusa_{name}", {"model_name": "m", **labels})


def latencies(**counts):
    """Steps by the place of their bucket, b0 to b22."""
    return tuple(counts.get(f"b{place}", 0) for place in range(len(STEP_LATENCY_BOUNDS_S) + 1))


def test_totals_go_on_when_the_worker_is_restarted():
    page = Page()

    def update(num_starts, steps, hits):
        page.metrics.update(EngineStats(num_starts=num_starts, num_steps_total=steps, num_head_hits_total=hits))
        ranks = [page("spec_decode_head_hits_total", head=str(head), rank=str(rank + 1)) for head, rank in RANKS]
        return page("engine_steps_total"), ranks, page("worker_restarts_total")

    assert update(1, 10, (3, 0, 1)) == (10, [3, 0, 1], 0)
    assert update(1, 20, (4, 1, 1)) == (20, [4, 1, 1], 0)
    # The next worker has done more, by the time of the scrape, than the one before: no less a restart.
    assert update(2, 25, (5, 0, 2)) == (45, [9, 1, 3], 1)
    assert update(2, 26, (5, 0, 3)) == (46, [9, 1, 4], 1)
    # It died twice since.
    assert update(4, 1, (1, 0, 0)) == (47, [10, 1, 4], 3)


def test_a_dead_engine_runs_nothing_and_an_old_snapshot_takes_nothing_back():
    page = Page()
    page.metrics.update(EngineStats(num_starts=2, num_running=3, num_blocks_used=5, num_blocks=100, num_steps_total=30))
    assert (page("num_requests_running"), page("kv_cache_usage_perc"), page("engine_up")) == (3, 0.05, 1)
    page.metrics.update(None)
    assert (page("num_requests_running"), page("kv_cache_usage_perc"), page("engine_up")) == (0, 0, 0)
    assert (page("engine_steps_total"), page("worker_restarts_total"), page("kv_cache_blocks")) == (30, 1, 100)
    page.metrics.update(EngineStats(num_starts=2, num_steps_total=28))
    page.metrics.update(EngineStats(num_starts=1, num_steps_total=99))
    assert page("engine_steps_total") == 30
    page.metrics.update(EngineStats(num_starts=2, num_steps_total=31))
    assert page("engine_steps_total") == 31


async def test_a_worker_that_is_killed_costs_no_counter_anything():
    client = make_worker_client(make_config("delay=0.01"))
    app = create_app(client, lambda info: FakeText(), ServerSettings())
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await until(lambda: client.is_ready)
            answer = await complete(http, max_tokens=20)
            assert answer.json()["usage"]["completion_tokens"] == 20
            pages = [await scrape(http)]
            lost = [asyncio.create_task(complete(http, max_tokens=5000)) for _ in range(2)]
            await until(lambda: client.stats.num_running == 2)
            os.kill(client.worker_pid, signal.SIGKILL)
            assert [(await request).status_code for request in lost] == [500, 500]
            pages.append(await scrape(http))
            await until(lambda: client.is_ready)
            assert (await complete(http, max_tokens=4)).status_code == 200
            pages.append(await scrape(http))
    for earlier, later in itertools.pairwise(pages):
        assert [key for key, value in earlier.items() if is_total(key) and later[key] < value] == []
    first, _, last = pages
    assert (first["medusa_engine_steps_total"], first["medusa_worker_restarts_total"]) == (20, 0)
    assert last["medusa_worker_restarts_total"] == 1
    assert last["medusa_engine_steps_total"] >= 24 <= last["medusa_step_latency_seconds_count"]
    assert last["medusa_request_success_total", "finished_reason", "error"] == 2
    assert last["medusa_request_success_total", "finished_reason", "length"] == 2


async def complete(http, **body):
    return await http.post("/v1/completions", json={"model": "fake", "prompt": "Hi", **body})


def test_drafts_that_were_right_by_who_offered_them():
    page = Page()
    assert page("spec_decode_accepted_by_source_total", source="lookup") == 0
    page.metrics.update(EngineStats(num_head_hits_total=(7, 2, 4), num_lookup_hits_total=5))
    assert page("spec_decode_accepted_by_source_total", source="head") == 13
    assert page("spec_decode_accepted_by_source_total", source="lookup") == 5
    assert page("spec_decode_head_hits_total", head="1", rank="2") == 2
    assert page("spec_decode_head_hits_total", head="2", rank="1") == 4


def test_steps_by_tree_size_and_what_they_cost():
    page = Page()
    page.metrics.update(
        EngineStats(
            tree_size=8,
            num_steps_by_size_total=(5, 0, 2),
            decode_cost_seconds_total=1.5,
            draft_cost_seconds_total=0.25,
            plain_cost_seconds_total=3.0,
        )
    )
    assert [page("decode_steps_by_tree_size_total", nodes=nodes) for nodes in ("1", "4", "8")] == [5, 0, 2]
    assert page("tree_size") == 8
    assert page("decode_step_cost_seconds_total") == 1.5
    assert page("draft_cost_seconds_total") == 0.25
    assert page("plain_decode_cost_seconds_total") == 3.0


def test_step_latencies_are_a_histogram():
    page = Page()
    assert page("step_latency_seconds_count") == 0
    page.metrics.update(EngineStats(num_steps_by_latency_total=latencies(b0=4, b2=2, b22=1), step_seconds_total=9.5))
    page.metrics.update(EngineStats(num_starts=2, num_steps_by_latency_total=latencies(b2=3), step_seconds_total=0.5))
    assert (page("step_latency_seconds_count"), page("step_latency_seconds_sum")) == (10, 10.0)
    assert [page("step_latency_seconds_bucket", le=le) for le in ("0.0005", "0.00075", "0.001", "2.5", "+Inf")] == [4, 4, 9, 9, 10]


@pytest.mark.parametrize("name", ["spec_decode_head_hits", "decode_steps_by_tree_size"])
def test_an_engine_without_heads_has_no_series_for_them(name):
    page = Page(INFO)
    families = {family.name: family for family in page.registry.collect()}
    assert len(families[f"medusa_{name}"].samples) == (name == "decode_steps_by_tree_size")


async def test_what_runs_here(make_http):
    values = await scrape(await make_http(FakeClient()))
    for label, value in {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }.items():
        assert values["medusa_build_info", label, value] == 1
    for label, value in {"model": "tiny", "heads": "3", "tree": "test", "max_model_len": "256", "num_blocks": "100"}.items():
        assert values["medusa_engine_info", label, value] == 1


def subclasses(error_class):
    return [error_class, *(below for subclass in error_class.__subclasses__() for below in subclasses(subclass))]


def test_every_error_that_clients_can_do_something_about_is_a_refusal():
    for error_class in subclasses(MedusaError)[1:]:
        answer = answer_for(error_class("Why."))
        assert is_refusal(error_class) == (answer.status < 500 or answer.retry_after_s is not None), error_class
        assert (error_class.code in refusal_codes()) == is_refusal(error_class)


async def test_refusals_by_reason(make_http):
    http = await make_http(api_key=("secret",), max_body_bytes=100)
    values = await scrape(http)
    assert values["medusa_requests_refused_total"] == 0
    assert {("medusa_requests_refused_total", "reason", code) for code in refusal_codes()} <= set(values)
    headers = {"authorization": "Bearer secret"}
    await http.post("/v1/completions", json={})
    await http.post("/v1/completions", content=b"{", headers=headers)
    await http.post("/v1/completions", content=b"x" * 101, headers=headers)
    await http.get("/v1/models/unknown", headers=headers)
    http.app.state.serving.is_draining = True
    await http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers=headers)
    # Neither an answer without an error nor a route that does not exist is a refusal.
    await http.get("/v1/models", headers=headers)
    await http.get("/nowhere", headers=headers)
    values = await scrape(http)
    for code in ("invalid_api_key", "invalid_json", "request_too_large", "model_not_found", "server_draining"):
        assert values["medusa_requests_refused_total", "reason", code] == 1, code
    assert values["medusa_requests_refused_total"] == 5
