"""Figures of docs/scaling.md on vllm-router: `python -m tests.scale.measure_router`.

Workers are real servers over a fake engine of fixed speed, so that the model's work does not hide the router's.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.scale.load import Load, Outcome, answers_alone
from tests.scale.processes import Program, answers, free_ports, installed, until
from tests.scale.test_router import ROUTER_FLAGS

NUM_CLIENTS = 64
NUM_TOKENS = 60
# Of a fake engine: a token, then three a step.
NUM_FRAMES = 21
STEP_S = 0.05
QUICK = ("--worker-startup-check-interval", "1")
KILLS = {
    "the flags of docs/scaling.md": ROUTER_FLAGS,
    "the router's defaults": QUICK,
    "its defaults, --disable-retries": (*QUICK, "--disable-retries"),
}
# For a worker to be asked again.
LIMIT_S = 90


class Fleet:
    """Two workers, a router, and their ports."""

    def __init__(self, flags: tuple[str, ...], folder: Path, *, step_s: float) -> None:
        self.port, self.metrics_port, *self.worker_ports = free_ports(4)
        self.url = f"http://127.0.0.1:{self.port}"
        self.worker_urls = [f"http://127.0.0.1:{port}" for port in self.worker_ports]
        self._folder = folder
        self._step_s = step_s
        self.workers = [self.start_worker(port) for port in self.worker_ports]
        for url in self.worker_urls:
            until(lambda url=url: answers(f"{url}/ready"))
        ports = ["--port", self.port, "--prometheus-port", self.metrics_port]
        command = [installed("router", "vllm-router"), *ports, "--worker-urls", *self.worker_urls, *flags]
        self.router = Program(command, folder / "router.log")
        self.router.until(lambda: answers(f"{self.url}/readiness"))

    def start_worker(self, port: int) -> Program:
        command = [sys.executable, "-m", "tests.server.drain_server", self._step_s, "--port", port]
        return Program(command, self._folder / f"worker-{port}.log")

    def num_tokens(self, index: int) -> float:
        text = httpx.get(f"{self.worker_urls[index]}/metrics", trust_env=False).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("medusa_generation_tokens_total"))

    def num_retries(self) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", trust_env=False).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm_router_retries_total"))

    def load(self, *, streamed: tuple[bool, ...] = (True, False)) -> Load:
        """Clients with a prompt each; the fake engine answers all alike."""
        (text,) = answers_alone(self.worker_urls[1], num_clients=1, num_tokens=NUM_TOKENS).values()
        texts = {os.urandom(16).hex(): text for _ in range(NUM_CLIENTS)}
        return Load(self.url, texts=texts, num_tokens=NUM_TOKENS, streamed=streamed)

    def stop(self) -> None:
        for program in (self.router, *self.workers):
            program.kill()


async def kill_and_restart(fleet: Fleet) -> tuple[Outcome, float | None]:
    """What clients met, and how many seconds after a killed worker was ready again it was asked: None if it was not."""
    async with fleet.load() as load:
        await asyncio.sleep(3)
        fleet.workers[0].kill()
        await asyncio.sleep(5)
        fleet.workers[0] = fleet.start_worker(fleet.worker_ports[0])
        await asyncio.to_thread(until, lambda: answers(f"{fleet.worker_urls[0]}/ready"))
        ready = time.monotonic()
        while not await asyncio.to_thread(fleet.num_tokens, 0) and time.monotonic() < ready + LIMIT_S:
            await asyncio.sleep(0.1)
        rejoin_s = time.monotonic() - ready
    return load.outcome, rejoin_s if rejoin_s < LIMIT_S else None


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def cost_of_routing(fleet: Fleet, *, is_streamed: bool) -> float:
    """The router's CPU time for a request, in microseconds."""
    before = cpu_s(fleet.router.process.pid)
    async with fleet.load(streamed=(is_streamed,)) as load:
        await asyncio.sleep(15)
    return (cpu_s(fleet.router.process.pid) - before) / load.outcome.num_requests * 1e6


def main() -> None:
    for name, flags in KILLS.items():
        with tempfile.TemporaryDirectory() as folder:
            fleet = Fleet(flags, Path(folder), step_s=STEP_S)
            outcome, rejoin_s = asyncio.run(kill_and_restart(fleet))
            trouble = [round(second, 1) for second in outcome.trouble_s]
            span = f"{min(trouble)} to {max(trouble)} s" if trouble else "none"
            print(
                f"{name}: {outcome.num_requests} requests, attempts {dict(outcome.attempts)} (trouble: {span}), "
                f"{outcome.num_retried} sent again by clients, {len(outcome.lost)} lost {outcome.lost[:1]}, "
                f"{fleet.num_retries():.0f} retries of the router, longest {outcome.longest_s:.1f} s, asked again after {rejoin_s}",
                flush=True,
            )
            fleet.stop()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(ROUTER_FLAGS, Path(folder), step_s=0)
        whole_us, streamed_us = (asyncio.run(cost_of_routing(fleet, is_streamed=is_streamed)) for is_streamed in (False, True))
        print(f"CPU time of the router: {whole_us:.0f} us for a whole answer, {streamed_us:.0f} us for one of {NUM_FRAMES} frames")
        fleet.stop()


if __name__ == "__main__":
    main()
