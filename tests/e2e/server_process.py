"""A `medusa-server` process with the demo model, and what tests read from it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-c", "from server.main import main; main()")
MODEL = "Qwen2.5-Coder-0.5B-Instruct"
# Bounds against hanging, generous because tests share small machines; nothing is expected to come near them.
START_TIMEOUT_S = 240
REQUEST_TIMEOUT_S = 180


def environment() -> dict[str, str]:
    """The shell's, without options of the server in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def until(condition: Callable[[], Any], *, timeout_s: float = 60) -> Any:
    """Poll until `condition` is true, and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.05)
    return value


class Scrape:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        self.names = {sample.name for sample in self._samples}

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples of `medusa_<name>` that carry `labels`."""
        name = f"medusa_{name}"
        assert name in self.names, f"/metrics has no {name}"
        return sum(sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items())


class Server:
    """A running server. `log` is the file that collects its stderr."""

    def __init__(self, flags: tuple[str, ...], log: Path) -> None:
        self.flags = flags
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen([*COMMAND, "--port", "0", *flags], cwd=ROOT, env=environment(), stderr=stderr)
        try:
            self.url = until(self._address)
            self.http = httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False)
            until(self._is_ready, timeout_s=START_TIMEOUT_S)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.log.read_text()
        match = re.search(r"Listening on (http://\S+)", self.log.read_text())
        return match and match[1]

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.http.get("/ready").status_code == 200

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def sdk(self, *, is_strict: bool = True) -> OpenAI:
        """The OpenAI SDK, which raises for answers that do not fit its types if `is_strict`."""
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key="unused",
            max_retries=0,
            http_client=httpx.Client(timeout=REQUEST_TIMEOUT_S, trust_env=False),
            _strict_response_validation=is_strict,
        )

    def complete(self, prompt: str | list[str], **fields: Any) -> dict[str, Any]:
        """A greedy completion, unless `fields` say otherwise."""
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, **fields}
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, prompt: str, **fields: Any) -> str:
        return self.complete(prompt, **fields)["choices"][0]["text"]

    def scrape(self) -> Scrape:
        return Scrape(self.http.get("/metrics").text)

    def until_idle(self) -> Scrape:
        """The first scrape in which no request runs or waits."""

        def idle() -> Scrape | None:
            scrape = self.scrape()
            return scrape if scrape.value("num_requests_running") + scrape.value("num_requests_waiting") == 0 else None

        return until(idle)

    def worker_pid(self) -> int:
        """The engine's process: the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def stop(self) -> None:
        """End it, waiting for nobody."""
        self.http.close()
        for _ in range(2):  # the second signal skips the drain
            if self.is_running:
                self.process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process.wait()


class ServerSlot:
    """Holds one server at a time, because each needs gigabytes. Asking for the options it runs with starts nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: Server | None = None
        self._num_starts = 0

    def get(self, *flags: str) -> Server:
        if self._server is None or not self._server.is_running or self._server.flags != flags:
            self.clear()
            self._num_starts += 1
            self._server = Server(flags, self._folder / f"server-{self._num_starts}.log")
        return self._server

    def clear(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = None
