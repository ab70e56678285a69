"""The containers' own commands, run here: the image's entry point with compose's arguments, the health check, the stop signal.

The model is scripted, and ports are replaced by free ones; the rest is what a container would run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.deploy.deployment import ROOT, TOOLS, compose_services, dockerfile_stages

HEALTH_CHECK = [sys.executable, str(ROOT / "deploy/docker/healthcheck.py")]
# vllm-router has dependencies of its own, so it is installed apart.
ROUTER = shutil.which("vllm-router", path=f"{TOOLS}:{ROOT / 'build/scale/router/bin'}")
START_TIMEOUT_S = 60


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def entry_command(service: dict, ports: dict[int, int]) -> tuple[str, list[str]]:
    """(program, arguments) of a service, with other ports."""
    program, *arguments = [*dockerfile_stages()[service["build"]["target"]].entry_point, *(service["command"] or ())]
    text = json.dumps(arguments)
    for port, replacement in ports.items():
        text = re.sub(rf"\b{port}\b", str(replacement), text)
    return program, json.loads(text)


def check_health(test: list[str], port: int) -> int:
    """Exit code of a health check, with another port."""
    kind, program, *arguments = test if test[0] == "CMD" else ["CMD", *test]
    assert (kind, program) == ("CMD", "healthcheck")
    arguments = [argument.replace(":8000", f":{port}") for argument in arguments]
    # A proxy of the environment is none of a health check's business.
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    return subprocess.run([*HEALTH_CHECK, *arguments], env=environment, capture_output=True, check=False, timeout=30).returncode


@contextmanager
def running(command: list[str]):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}
    process = subprocess.Popen(command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_server(service: dict, port: int):
    program, arguments = entry_command(service, {8000: port})
    assert program == "medusa-server"
    with running([sys.executable, "-m", "tests.server.drain_server", "0.01", *arguments]) as process:
        yield process


def wait_until_healthy(test: list[str], port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while check_health(test, port) != 0:
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, f"not healthy within {START_TIMEOUT_S} s"
        time.sleep(0.05)


@pytest.mark.parametrize(("profile", "name"), [("single", "server"), ("scale", "worker-1")])
def test_a_server_turns_healthy_and_drains_on_the_stop_signal(profile, name):
    service = compose_services("--profile", profile)[name]
    stage = dockerfile_stages()[service["build"]["target"]]
    port = free_port()
    assert check_health(service["healthcheck"]["test"], port) == 1
    with running_server(service, port) as process:
        wait_until_healthy(service["healthcheck"]["test"], port, process)
        assert check_health(stage.health_check, port) == 0
        assert check_health(["healthcheck", "http://127.0.0.1:8000/no-such-page"], port) == 1
        process.send_signal(getattr(signal, stage.last("STOPSIGNAL")))
        assert process.wait(timeout=30) == 0


# Short, and among the long ones because `make test` does not install the router.
@pytest.mark.long
@pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed: `make scale` does it")
def test_the_router_turns_healthy_once_a_worker_is_and_passes_requests_on(tmp_path):
    import httpx

    services = compose_services("--profile", "scale")
    ports = {name: free_port() for name in ("worker-1", "worker-2", "router", "metrics")}
    program, arguments = entry_command(services["router"], {29000: ports["metrics"]})
    assert program == "vllm-router"
    for name in ("worker-1", "worker-2"):
        arguments = [argument.replace(f"http://{name}:8000", f"http://127.0.0.1:{ports[name]}") for argument in arguments]
    arguments = [str(ports["router"]) if argument == "8000" else argument for argument in arguments]
    with (
        running_server(services["worker-1"], ports["worker-1"]),
        running_server(services["worker-2"], ports["worker-2"]),
        running([ROUTER, *arguments]) as router,
    ):
        wait_until_healthy(services["router"]["healthcheck"]["test"], ports["router"], router)
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 4}
        with httpx.Client(base_url=f"http://127.0.0.1:{ports['router']}", trust_env=False, timeout=30) as http:
            assert http.get("/v1/models").status_code == 200
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
        metrics = httpx.get(f"http://127.0.0.1:{ports['metrics']}/metrics", trust_env=False)
        assert "vllm_router_" in metrics.text
