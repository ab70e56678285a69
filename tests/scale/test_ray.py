"""The app on Ray Serve: the shipped config file with two replicas of a tiny model on this machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.settings import ServerSettings
from tests.e2e.server_process import Scrape
from tests.scale.load import Load, Outcome, answers_alone
from tests.scale.processes import ROOT, STEADY, Program, answers, environment, free_ports, installed, until

CONFIG = ROOT / "deploy" / "ray" / "serve_config.yaml"
RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray kills replicas where the machine's memory is nearly used up, be it by others.
    "RAY_memory_monitor_refresh_ms": "0",
    # Nothing runs any more when the cluster is stopped.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


def shipped_config() -> dict[str, Any]:
    return yaml.safe_load(CONFIG.read_text())


def test_the_config_file_names_options_of_the_server_and_outlives_its_drain():
    replicas, targets = shipped_config()["applications"]
    assert replicas["args"]["server"].keys() <= ServerSettings.model_fields.keys()
    (deployment,) = replicas["deployments"]
    settings = ServerSettings(**replicas["args"]["server"])
    assert deployment["graceful_shutdown_timeout_s"] > settings.drain_timeout_s
    assert deployment["max_ongoing_requests"] == settings.max_num_seqs
    assert targets["route_prefix"] == "/metrics"


class Cluster:
    """A Ray head on this machine and the config file deployed on it."""

    def __init__(self, folder: Path, options: dict[str, object]) -> None:
        self.folder = folder
        self.options = options
        gcs, dashboard, client, http, self.metrics_port = free_ports(5)
        self.url = f"http://127.0.0.1:{http}"
        self.http_port = http
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        # Ray asks for a token, and would look for one in the home folder.
        self.token = secrets.token_hex(16)
        self.variables = {**RAY_VARIABLES, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        command = [
            *(installed("ray", "ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--num-cpus=4"),
            *("--dashboard-agent-listen-port=0", "--object-store-memory=100000000"),
        ]
        self.head = Program(command, folder / "ray.log", **self.variables)

    def deploy(self, num_replicas: int, **options: object) -> None:
        config = shipped_config()
        config["proxy_location"] = "HeadOnly"
        config["http_options"] |= {"host": "127.0.0.1", "port": self.http_port}
        arguments = config["applications"][0]["args"]
        arguments["metrics_port"] = self.metrics_port
        arguments["server"] = {**self.options, **options}
        (deployment,) = config["applications"][0]["deployments"]
        del deployment["autoscaling_config"]
        deployment |= {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 1}, "health_check_period_s": 1}
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [installed("ray", "serve"), "deploy", "--address", self.dashboard, path]
        self.head.until(self.applications)
        done = subprocess.run(
            command,
            env=environment(**self.variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout

    def applications(self) -> dict[str, Any] | None:
        """What Ray tells of them; None while it starts."""
        url, headers = f"{self.dashboard}/api/serve/applications/", {"authorization": f"Bearer {self.token}"}
        try:
            response = httpx.get(url, headers=headers, timeout=10, trust_env=False)
        except httpx.TransportError:
            return None
        return response.json() if response.status_code == 200 else None

    def targets(self) -> dict[str, str]:
        """Address by replica, as Prometheus is told it."""
        response = httpx.get(f"{self.url}/metrics/targets", timeout=10, trust_env=False)
        assert response.status_code == 200
        return {group["labels"]["replica"]: group["targets"][0] for group in response.json()}

    def until_targets(self, count: int) -> dict[str, str]:
        def listed() -> dict[str, str] | None:
            found = self.targets()
            return found if len(found) == count else None

        self.head.until(lambda: answers(f"{self.url}/metrics/targets"))
        return self.head.until(listed)

    def scrapes(self) -> list[Scrape]:
        return [Scrape(httpx.get(f"http://{address}/metrics", trust_env=False).text) for address in self.targets().values()]

    def total(self, name: str, **labels: str) -> float:
        return sum(scrape.value(name, **labels) for scrape in self.scrapes())

    def post(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={**STEADY, **fields}, timeout=60, trust_env=False)

    def stream(self, **fields: Any):
        body = {**STEADY, **fields, "stream": True}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False)

    def stop(self) -> None:
        self.head.stop()
        self.head.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, options) -> Iterator[Cluster]:
    installed("ray", "serve")
    cluster = Cluster(tmp_path_factory.mktemp("ray"), options)
    try:
        cluster.deploy(2)
        cluster.until_targets(2)
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.long
def test_both_replicas_answer_alike_and_both_are_scraped(cluster):
    texts = set()
    for _ in range(12):
        response = cluster.post(max_tokens=40)
        assert response.status_code == 200
        texts.add(response.json()["choices"][0]["text"])
    assert len(texts) == 1
    by_replica = [scrape.value("generation_tokens_total") for scrape in cluster.scrapes()]
    assert len(by_replica) == 2
    assert all(by_replica)
    assert sum(by_replica) == 12 * 40


@pytest.mark.long
def test_a_scrape_through_the_proxy_is_told_where_to_go(cluster):
    response = httpx.get(f"{cluster.url}/metrics", trust_env=False)
    assert response.status_code == 404
    assert "/metrics/targets" in response.json()["error"]["message"]


@pytest.mark.long
def test_streams_come_piece_by_piece_with_one_request_id(cluster):
    with cluster.stream(max_tokens=200) as response:
        pieces = list(response.iter_raw())
    assert len(pieces) > 20
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    assert len(response.headers.get_list("x-request-id")) == 1


@pytest.mark.long
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_ends_its_request(cluster, is_streamed):
    before = cluster.total("request_success_total", finished_reason="abort")
    if is_streamed:
        with cluster.stream(max_tokens=4000) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{cluster.url}/v1/completions", json={**STEADY, "max_tokens": 4000}, timeout=0.5, trust_env=False)
    until(lambda: cluster.total("request_success_total", finished_reason="abort") == before + 1)
    until(lambda: cluster.total("num_requests_running") == 0)


def replica_pid(replica: str, cluster: Cluster) -> int:
    """The process of a replica, as Ray's API tells it."""
    found = cluster.applications()
    assert found is not None
    replicas = found["applications"]["medusa"]["deployments"]["MedusaServer"]["replicas"]
    (pid,) = [entry["pid"] for entry in replicas if entry["replica_id"] == replica]
    return pid


@pytest.mark.long
def test_a_killed_replica_is_replaced_and_the_other_answers_meanwhile(cluster):
    before = cluster.until_targets(2)
    victim = next(iter(before))
    os.kill(replica_pid(victim, cluster), signal.SIGKILL)
    statuses = []

    def is_replaced() -> bool:
        # What was on its way to the dead one is a 500, which clients of OpenAI's API send again.
        statuses.append(cluster.post(max_tokens=4).status_code)
        now = cluster.targets()
        return len(now) == 2 and victim not in now

    cluster.head.until(is_replaced)
    assert set(statuses) <= {200, 500}
    assert statuses.count(500) <= 2
    assert statuses[-1] == 200
    until(lambda: cluster.post(max_tokens=4) and all(scrape.value("generation_tokens_total") for scrape in cluster.scrapes()))


def readiness(cluster: Cluster) -> list[int]:
    """What /ready says on the own port of each listed replica; 0 where nobody listens."""
    statuses = []
    for address in cluster.targets().values():
        try:
            statuses.append(httpx.get(f"http://{address}/ready", timeout=5, trust_env=False).status_code)
        except httpx.TransportError:
            statuses.append(0)
    return statuses


@pytest.mark.long
def test_a_replica_whose_engine_is_killed_comes_back(cluster):
    """Its server starts another one, or Ray, which sees that it is dead, another replica."""
    pid = replica_pid(next(iter(cluster.until_targets(2))), cluster)
    tasks = (Path("/proc") / str(pid) / "task").iterdir()
    (engine_pid,) = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    os.kill(engine_pid, signal.SIGKILL)
    until(lambda: any(status != 200 for status in readiness(cluster)))
    cluster.head.until(lambda: readiness(cluster) == [200, 200])
    assert {cluster.post(max_tokens=4).status_code for _ in range(8)} == {200}


@pytest.mark.long
def test_scaling_down_loses_nothing(cluster):
    """Streams run on both replicas when one of them is told to leave, and more requests come."""
    cluster.until_targets(2)
    texts = answers_alone(cluster.url, num_clients=6, num_tokens=300)

    async def ask() -> Outcome:
        async with Load(cluster.url, texts=texts, num_tokens=300) as running:
            await asyncio.to_thread(until, lambda: all(scrape.value("num_requests_running") for scrape in cluster.scrapes()))
            await asyncio.to_thread(cluster.deploy, 1)
            await asyncio.to_thread(cluster.until_targets, 1)
        return running.outcome

    outcome = asyncio.run(ask())
    assert outcome.attempts == {"ok": outcome.num_requests}
    assert outcome.wrong == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"port": 8000}, "server.port has no meaning behind Ray's proxy. Set http_options.port"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
    ids=["port", "unknown", "model"],
)
def test_ray_shows_why_a_deployment_failed(cluster, wrong, reason):
    """The last tests of the cluster: they replace what runs there."""
    cluster.deploy(1, **wrong)

    def failed() -> dict[str, Any] | None:
        found = cluster.applications()
        application = found["applications"]["medusa"]
        return application if "FAILED" in application["status"] or "UNHEALTHY" in application["status"] else None

    application = cluster.head.until(failed)
    messages = [application["message"], *(deployment["message"] for deployment in application["deployments"].values())]
    assert any(reason in message for message in messages), messages
