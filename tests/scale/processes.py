"""Programs that tests start and end, a tiny model for them to serve, and free ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "build" / "scale"
SERVER = (sys.executable, "-c", "from server.main import main; main()")
# A bound against hanging, generous because tests share small machines.
START_TIMEOUT_S = 120
# One token per step and no end before max_tokens: what is asked for says how long it takes.
STEADY = {"model": "tiny", "prompt": "Once", "temperature": 0, "ignore_eos": True, "speculative": {"enabled": False}}


def installed(environment: str, program: str) -> Path:
    """The path of a program that `make scale` installs; without it the test is skipped."""
    path = INSTALLED / environment / "bin" / program
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is missing: run `make scale`")
    return path


def environment(**more: str) -> dict[str, str]:
    """The shell's, without options of the server in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEDUSA_", "RAY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", **more}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def until(condition: Callable[[], Any], *, timeout_s: float = START_TIMEOUT_S) -> Any:
    """Poll until `condition` is true, and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.05)
    return value


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


class Program:
    """A running program in a process group of its own, ended with everything that it started. Its output goes to `log`."""

    def __init__(self, command: list[object], log: Path, **more: str) -> None:
        self.log = log
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment(**more),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def until(self, condition: Callable[[], Any], *, timeout_s: float = START_TIMEOUT_S) -> Any:
        """Poll as the function does, but end at once, with the log, if the program ends."""

        def running() -> Any:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            return condition()

        return until(running, timeout_s=timeout_s)

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, *, timeout_s: float = 30) -> None:
        """Ask it to end; kill it if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
