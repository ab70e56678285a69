"""Sums over front ends: what only grows never shrinks, whatever happens to who counted it."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from medusa_core.outputs import EngineStats
from server.front_ends import metrics_page
from server.front_ends.messages import Snapshot
from server.front_ends.metrics_page import MetricsPage
from server.front_ends.totals import add_up, families_of, metrics_of
from server.metrics import render
from server.settings import ServerSettings
from tests.server.fakes import INFO


def counted(*, requests=0, seconds=(), rate=0.0, route="a"):
    """What a front end tells of itself."""
    registry = CollectorRegistry()
    Counter("requests", "Requests.", ("route",), registry=registry).labels(route).inc(requests)
    histogram = Histogram("latency", "Seconds.", registry=registry, buckets=(1.0, 2.0))
    for value in seconds:
        histogram.observe(value)
    Gauge("rate", "Now.", registry=registry).set(rate)
    return families_of(registry.collect())


def test_a_sum_of_one_is_rendered_as_the_library_renders_it():
    registry = CollectorRegistry()
    Counter("requests", 'Requests, "quoted".', ("route",), registry=registry).labels('a"\n').inc(2)
    Histogram("latency", "Seconds.", ("x",), registry=registry, buckets=(0.5, 2.0)).labels("y").observe(1)
    Gauge("rate", "Now.", registry=registry).set(1.5)
    page = render(registry.collect())
    assert page == render(metrics_of(add_up([families_of(registry.collect())], [])))
    assert b"latency_bucket" in page


def test_counts_of_the_gone_stay_and_their_gauges_go():
    one = counted(requests=2, seconds=(0.5, 1.5), rate=3.0)
    two = counted(requests=5, seconds=(3.0,), rate=4.0, route="b")
    gone = counted(requests=10, seconds=(0.5,), rate=5.0)
    page = render(metrics_of(add_up([one, two], [gone]))).decode().splitlines()
    assert 'requests_total{route="a"} 12.0' in page
    assert 'requests_total{route="b"} 5.0' in page
    assert 'latency_bucket{le="1.0"} 2.0' in page
    assert 'latency_bucket{le="+Inf"} 4.0' in page
    assert "latency_sum 5.5" in page
    assert "rate 7.0" in page


class Engine:
    """What the page sees of the engine's client."""

    def __init__(self):
        self.stats = EngineStats(num_running=2, num_steps_total=10, num_preemptions_total=4)
        self.is_ready = True
        self.has_answered = True

    async def refresh(self):
        if not self.has_answered:
            await asyncio.sleep(60)


class FrontEnds:
    """Answers of front ends by name; one whose answer is None hangs."""

    def __init__(self, engine, answers):
        self.answers = answers
        self.page = MetricsPage(engine, ServerSettings(), self._collect)

    def _collect(self, collection_id):
        for name, families in self.answers.items():
            if families is not None:
                asyncio.get_running_loop().call_soon(self.page.receive, name, Snapshot(collection_id, families))
        return set(self.answers)

    async def lines(self):
        return (await self.page.render()).decode().splitlines()


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch):
    monkeypatch.setattr(metrics_page, "COLLECT_TIMEOUT_S", 0.05)


async def test_one_that_hangs_keeps_its_counts_and_loses_its_gauges():
    front_ends = FrontEnds(Engine(), {"0": counted(requests=2, rate=3.0), "1": counted(requests=5, rate=4.0)})
    lines = await front_ends.lines()
    assert {'requests_total{route="a"} 7.0', "rate 7.0"} <= set(lines)
    front_ends.answers["1"] = None
    assert {'requests_total{route="a"} 7.0', "rate 3.0"} <= set(await front_ends.lines())


async def test_one_that_dies_while_it_is_asked_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(metrics_page, "COLLECT_TIMEOUT_S", 60)
    front_ends = FrontEnds(Engine(), {"0": counted(requests=2), "1": None})
    front_ends.page.receive("1", Snapshot(None, counted(requests=5, rate=1.0)))
    asyncio.get_running_loop().call_later(0.01, front_ends.page.forget, "1")
    async with asyncio.timeout(10):
        assert 'requests_total{route="a"} 7.0' in await front_ends.lines()
    del front_ends.answers["1"]
    front_ends.answers["1b"] = counted(requests=1)
    assert 'requests_total{route="a"} 8.0' in await front_ends.lines()


async def test_the_engine_is_told_of_once_and_its_counters_survive_it():
    engine = Engine()
    front_ends = FrontEnds(engine, {"0": counted(), "1": counted()})
    running, preemptions = 'medusa_num_requests_running{model_name="tiny"}', 'medusa_num_preemptions_total{model_name="tiny"}'
    assert not any(line.startswith(running) for line in await front_ends.lines())
    front_ends.page.on_engine_up(INFO)
    assert {f"{running} 2.0", f"{preemptions} 4.0"} <= set(await front_ends.lines())
    engine.is_ready = False
    front_ends.page.on_engine_down()
    assert {f"{running} 0.0", f"{preemptions} 4.0"} <= set(await front_ends.lines())
    # The next one has taken more steps already than the last one had.
    engine.stats = EngineStats(num_steps_total=50, num_preemptions_total=1, num_starts=2)
    engine.is_ready = True
    front_ends.page.on_engine_up(INFO)
    assert f"{preemptions} 5.0" in await front_ends.lines()


async def test_an_engine_in_a_long_step_is_shown_as_it_was():
    engine = Engine()
    front_ends = FrontEnds(engine, {"0": counted(requests=1)})
    front_ends.page.on_engine_up(INFO)
    engine.has_answered = False
    assert 'medusa_num_requests_running{model_name="tiny"} 2.0' in await front_ends.lines()
