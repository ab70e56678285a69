"""Two plain replicas behind vllm-router: one is killed, comes back, another drains, and clients lose nothing for good.

Workers are real servers over a tiny model, so every answer can be compared with that of a server alone.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import Scrape
from tests.scale.load import Load, Outcome, answers_alone
from tests.scale.processes import ROOT, SERVER, STEADY, Program, answers, free_ports, installed, until

# As docs/scaling.md explains them.
ROUTER_FLAGS = (
    *("--policy", "cache_aware", "--balance-abs-threshold", "16"),
    *("--health-check-endpoint", "/ready", "--health-check-interval-secs", "1", "--health-check-timeout-secs", "2"),
    *("--health-failure-threshold", "2", "--health-success-threshold", "1"),
    *("--worker-startup-check-interval", "1"),
    *("--retry-max-retries", "5", "--retry-initial-backoff-ms", "50", "--retry-max-backoff-ms", "1000"),
    *("--cb-timeout-duration-secs", "5"),
)
NUM_CLIENTS = 8
NUM_TOKENS = 300


def test_the_page_on_scaling_shows_the_flags_that_are_tested_here():
    page = (ROOT / "docs" / "scaling.md").read_text()
    shown = " ".join(re.search(r"```sh\n(vllm-router [^`]*)```", page)[1].replace("\\\n", " ").split())
    for flag, value in zip(ROUTER_FLAGS[::2], ROUTER_FLAGS[1::2], strict=True):
        assert f"{flag} {value}" in shown


class Worker:
    """A server on one port, which can be killed and started again."""

    def __init__(self, options: dict[str, object], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if not isinstance(value, list)]
        self._command = [*SERVER, f"--port={port}", "--served-model-name=tiny", *flags]
        self.start()

    def start(self) -> None:
        self.program = Program(self._command, self._log)

    def until_ready(self) -> None:
        self.program.until(lambda: answers(f"{self.url}/ready"))

    def scrape(self) -> Scrape:
        return Scrape(httpx.get(f"{self.url}/metrics", trust_env=False).text)

    def num_tokens(self) -> float:
        return self.scrape().value("generation_tokens_total")


class Fleet:
    """Two workers and the router in front of them."""

    def __init__(self, options: dict[str, object], folder: Path) -> None:
        router_program = installed("router", "vllm-router")
        port, metrics_port, *worker_ports = free_ports(4)
        self.url = f"http://127.0.0.1:{port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self.programs: list[Program] = []
        self.workers = [Worker(options, worker_port, folder / f"worker-{worker_port}.log") for worker_port in worker_ports]
        for worker in self.workers:
            worker.until_ready()
        urls = [worker.url for worker in self.workers]
        command = [router_program, "--port", port, "--prometheus-port", metrics_port, "--worker-urls", *urls, *ROUTER_FLAGS]
        self.router = Program(command, folder / "router.log")
        self.router.until(lambda: answers(f"{self.url}/readiness"))

    def post(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={**STEADY, **fields}, timeout=60, trust_env=False)

    def router_total(self, name: str) -> float:
        """Sum of the samples of `vllm_router_<name>`."""
        text = httpx.get(self.metrics_url, trust_env=False).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm_router_{name}"))

    def stop(self) -> None:
        self.router.kill()
        for worker in self.workers:
            worker.program.kill()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, options) -> Iterator[Fleet]:
    installed("router", "vllm-router")
    fleet = Fleet(options, tmp_path_factory.mktemp("fleet"))
    yield fleet
    fleet.stop()


@pytest.fixture(scope="module")
def texts(fleet: Fleet) -> dict[str, str]:
    return answers_alone(fleet.workers[1].url, num_clients=NUM_CLIENTS, num_tokens=NUM_TOKENS)


def check(outcome: Outcome) -> None:
    """Every request was answered in the end, and as a server alone answers it."""
    print(f"\n{outcome.num_requests} requests, {dict(outcome.attempts)}, {outcome.num_retried} sent again by clients")
    assert outcome.attempts["ok"] == outcome.num_requests >= NUM_CLIENTS
    assert outcome.lost == []
    assert outcome.wrong == []


@pytest.mark.long
def test_requests_reach_both_workers_and_chats_and_errors_pass(fleet, texts):
    before = [worker.num_tokens() for worker in fleet.workers]

    async def ask() -> Outcome:
        async with Load(fleet.url, texts=texts, num_tokens=NUM_TOKENS) as running:
            await asyncio.sleep(2)
        return running.outcome

    check(asyncio.run(ask()))
    assert all(worker.num_tokens() > count for worker, count in zip(fleet.workers, before, strict=True))
    refused = fleet.post(no_such_field=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "no_such_field")


@pytest.mark.long
def test_no_request_is_lost_when_a_worker_is_killed_and_comes_back(fleet, texts):
    worker = fleet.workers[0]

    async def ask() -> Outcome:
        async with Load(fleet.url, texts=texts, num_tokens=NUM_TOKENS) as running:
            await asyncio.sleep(1)
            worker.program.kill()
            await asyncio.sleep(4)
            worker.start()
            await asyncio.to_thread(worker.until_ready)
            await asyncio.to_thread(until, worker.num_tokens)
        return running.outcome

    outcome = asyncio.run(ask())
    check(outcome)
    # Streams that had begun on the killed one are all that clients had to send again.
    assert outcome.attempts.keys() <= {"ok", "cut"}
    assert outcome.attempts["cut"] <= NUM_CLIENTS // 2
    assert fleet.router_total("retries_total") > 0


@pytest.mark.long
def test_a_worker_that_drains_loses_nothing(fleet, texts):
    """Clients notice nothing at all: streams end, and what the draining worker refuses, the router asks the other one."""
    worker = fleet.workers[0]

    async def ask() -> Outcome:
        async with Load(fleet.url, texts=texts, num_tokens=NUM_TOKENS) as running:
            await asyncio.to_thread(until, lambda: worker.scrape().value("num_requests_running"))
            worker.program.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(worker.program.wait) == 0
            await asyncio.sleep(1)
        return running.outcome

    outcome = asyncio.run(ask())
    check(outcome)
    assert outcome.attempts.keys() == {"ok"}


@pytest.mark.long
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_ends_its_request(fleet, is_streamed):
    worker = fleet.workers[1]
    before = worker.scrape().value("request_success_total", finished_reason="abort")
    body = {**STEADY, "max_tokens": 4000}
    if is_streamed:
        with httpx.stream("POST", f"{fleet.url}/v1/completions", json={**body, "stream": True}, trust_env=False) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=0.5, trust_env=False)
    until(lambda: worker.scrape().value("request_success_total", finished_reason="abort") == before + 1)
    until(lambda: worker.scrape().value("num_requests_running") == 0)
