"""Server and Prometheus under minutes of mixed traffic: what dashboards and alerts show is there, and is true.

One run, which the tests look at from all sides. Sized for a CPU.
"""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from resource import getpagesize
from urllib.parse import urlsplit

import pytest
import yaml

from deploy.grafana.panel_data import expand, panels_of
from tests.e2e.prometheus_process import PrometheusProcess
from tests.e2e.server_process import ROOT, Scrape, Server, ServerSlot, until
from tests.e2e.traffic import COMPLETIONS, LONG_STREAM_S, Client, Ledger, Traffic

pytestmark = [
    pytest.mark.demo,
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt-get install prometheus)"
    ),
]

ALONE_S, MIXED_S = 30, 180
KEY_NAME, KEY = "tester", "a-key-of-the-test"
# Few lanes and blocks, so that requests wait, are refused and preempted.
FLAGS = (
    *("--device", "cpu", "--max-model-len", "2048", "--num-blocks", "140", "--max-num-seqs", "4"),
    *("--max-queued-requests", "8", "--api-key", f"{KEY_NAME}={KEY}"),
)
SCRAPE_INTERVAL_S, EVALUATION_INTERVAL_S = (
    int(value.removesuffix("s"))
    for value in list(yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"].values())
)
# Grafana's $__rate_interval for a scrape interval of 5 s.
RATE_INTERVAL_S = 4 * SCRAPE_INTERVAL_S
# What the server's two processes may hold more in the second half than in the first: they hold some 3 GiB.
MAX_GROWTH_BYTES = 64 * 2**20
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards/json").glob("*.json"))
RULES = {
    name: [
        rule
        for group in yaml.safe_load((ROOT / f"deploy/prometheus/rules/{name}.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    for name in ("recording", "alerts")
}


class MemoryWatch:
    """Resident bytes of processes, together, every second."""

    def __init__(self, *pids: int) -> None:
        self.samples: list[int] = []
        self._files = [Path(f"/proc/{pid}/statm") for pid in pids]
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_done.wait(1):
            self.samples.append(getpagesize() * sum(int(file.read_text().split()[1]) for file in self._files))


@dataclass
class Run:
    """What is left when the traffic has ended.

    scrape: the server's metrics at rest. start_s, end_s: of the traffic, UNIX time. memory: resident bytes, second by second of the
    mixed part. log: fields of the access log's lines on requests that the engine took.
    """

    server: Server
    prometheus: PrometheusProcess
    ledger: Ledger
    scrape: Scrape
    start_s: float
    end_s: float
    memory: list[int] = field(default_factory=list)
    log: list[dict[str, str]] = field(default_factory=list)

    def grown(self, name: str, **labels: str) -> float:
        """What Prometheus has of a counter, which was 0 when the traffic began."""
        selector = ",".join(f'{label}="{value}"' for label, value in labels.items())
        return self.prometheus.value(f"sum(medusa_{name}{{{selector}}}) or vector(0)", time_s=self.end_s)


@pytest.fixture(scope="module")
def run(slot: ServerSlot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    server = slot.get(*FLAGS)
    prometheus = PrometheusProcess(urlsplit(server.url).netloc, tmp_path_factory.mktemp("prometheus"))
    try:
        yield _drive(server, prometheus)
    finally:
        prometheus.stop()
        slot.clear()


def _drive(server: Server, prometheus: PrometheusProcess) -> Run:
    up = f'up{{job="{prometheus.job}"}} == 1'
    until(lambda: prometheus.api.at(up, time_s=time.time()))
    start_s = time.time()
    traffic = Traffic(server.url, KEY)
    traffic.run_alone(ALONE_S)
    with MemoryWatch(server.process.pid, server.worker_pid()) as memory:
        traffic.run_mixed(MIXED_S)
    scrape = server.until_idle()
    # The last scrape and the last evaluation of the rules must be of the server at rest.
    time.sleep(SCRAPE_INTERVAL_S + 1)
    return Run(server, prometheus, traffic.ledger, scrape, start_s, time.time(), memory.samples, _access_log(server.log))


def _access_log(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if " server.access: " in line]
    return [fields for line in lines if "finish_reasons" in (fields := dict(re.findall(r"(\w+)=(\S+)", line)))]


def total(entries: list[dict[str, str]], key: str) -> int:
    """Sum of a field; what a line leaves out is 0."""
    return sum(int(entry.get(key, 0)) for entry in entries)


def test_the_traffic_was_what_it_was_meant_to_be(run: Run):
    assert run.ledger.surprises == []
    assert max(run.ledger.stream_seconds) >= LONG_STREAM_S
    assert run.ledger.left > 0
    assert run.ledger.refusals["server_overloaded"] > 0
    assert min(run.ledger.ended["stop"], run.ledger.ended["length"]) > 0


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_no_panel_is_without_data(run: Run, dashboard):
    empty = []
    for panel in panels_of(dashboard):
        for target in panel.targets:
            expr = expand(target.expr, rate_interval_s=RATE_INTERVAL_S, range_s=run.end_s - run.start_s)
            lines = run.prometheus.api.over(expr, start_s=run.start_s, end_s=run.end_s, step_s=SCRAPE_INTERVAL_S)
            if not any(line.points for line in lines):
                empty.append(f"{panel.title}: {expr}")
    assert empty == []


def test_prometheus_evaluates_every_rule(run: Run):
    groups = run.prometheus.api.get("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len(RULES["recording"]) + len(RULES["alerts"])
    assert [rule for rule in found if rule["health"] != "ok"] == []


def test_every_recording_rule_has_recorded(run: Run):
    window = {"start_s": run.start_s, "end_s": run.end_s, "step_s": SCRAPE_INTERVAL_S}
    assert [rule["record"] for rule in RULES["recording"] if not run.prometheus.api.over(rule["record"], **window)] == []


# There is no router here.
@pytest.mark.parametrize(
    "rule", [rule for rule in RULES["alerts"] if rule["alert"] != "MedusaRouterDown"], ids=lambda rule: rule["alert"]
)
def test_what_an_alert_compares_has_a_value(run: Run, rule):
    *value, _ = rule["expr"].splitlines()
    window = {"start_s": run.start_s, "end_s": run.end_s, "step_s": SCRAPE_INTERVAL_S}
    if value:
        lines = run.prometheus.api.over("\n".join(value), **window)
        assert any(line.points for line in lines)
    else:  # about something that is missing, and here nothing is
        assert run.prometheus.api.over(rule["expr"], **window) == []


def test_a_server_that_is_well_wakes_nobody(run: Run):
    """Capacity and refusals aside: this traffic asks for those. What waits longer than it lasts may not even be pending."""
    # Up to the first evaluation Prometheus remembers that it had not scraped anything yet.
    start_s = run.start_s + EVALUATION_INTERVAL_S
    alerts = run.prometheus.api.over("ALERTS", start_s=start_s, end_s=run.end_s, step_s=EVALUATION_INTERVAL_S)
    names = {line.labels["alertname"] for line in alerts}
    firing = {line.labels["alertname"] for line in alerts if line.labels["alertstate"] == "firing"}
    assert firing & {"MedusaTargetDown", "MedusaEngineStalled"} == set()
    well = {"MedusaTargetMissing", "MedusaModelNotLoaded", "MedusaEngineDown", "MedusaFrontEndsMissing"}
    well |= {"MedusaWorkerRestarted", "MedusaWorkerCrashLoop"}
    assert names & well == set()


def test_answers_and_refusals_are_counted_as_clients_count_them(run: Run):
    ledger = run.ledger
    lines = run.prometheus.api.at(
        'sum by (route, status) (medusa_http_requests_total{route=~"/v1/.+|unmatched"})', time_s=run.end_s
    )
    counted = {(line.labels["route"], int(line.labels["status"])): line.points[0][1] for line in lines}
    assert counted == dict(ledger.answers)
    lines = run.prometheus.api.at("sum by (reason) (medusa_requests_refused_total) > 0", time_s=run.end_s)
    assert {line.labels["reason"]: line.points[0][1] for line in lines} == dict(ledger.refusals)
    lines = run.prometheus.api.at("sum by (key, status) (medusa_key_requests_total)", time_s=run.end_s)
    by_key = {(line.labels["key"], int(line.labels["status"])): line.points[0][1] for line in lines}
    by_status = Counter(status for _, status in ledger.answers.elements())
    assert by_key == {(KEY_NAME, status): count for status, count in by_status.items() if status != 401}


def test_choices_are_counted_as_clients_count_them(run: Run):
    lines = run.prometheus.api.at("sum by (finished_reason) (medusa_request_success_total) > 0", time_s=run.end_s)
    counted = {line.labels["finished_reason"]: line.points[0][1] for line in lines}
    assert counted == {**run.ledger.ended, "abort": run.ledger.left}


def test_tokens_are_counted_as_clients_and_the_log_count_them(run: Run):
    """To the token. Clients who left do not know what was made for them after that, but the access log does."""
    stayed = [entry for entry in run.log if "abort" not in entry["finish_reasons"]]
    left = [entry for entry in run.log if "abort" in entry["finish_reasons"]]
    ledger = run.ledger
    assert total(stayed, "completion_tokens") == ledger.completion_tokens
    assert total(stayed, "prompt_tokens") == ledger.prompt_tokens
    assert total(stayed, "cached_tokens") == ledger.cached_tokens
    assert total(left, "completion_tokens") >= ledger.left_tokens > 0
    # Those whose client went before the first token have no such time, and their prompt may not have been computed.
    begun = [entry for entry in run.log if "ttft_ms" in entry]
    assert run.grown("generation_tokens_total") == total(run.log, "completion_tokens") == run.grown("request_generation_tokens_sum")
    assert run.grown("prompt_tokens_total") == total(begun, "prompt_tokens") == run.grown("request_prompt_tokens_sum")
    assert run.grown("prompt_tokens_cached_total") == total(begun, "cached_tokens")
    assert run.grown("spec_decode_num_drafts_total") == total(run.log, "drafts")
    assert run.grown("spec_decode_num_accepted_tokens_total") == total(run.log, "accepted_tokens")


def test_tokens_are_those_of_steps(run: Run):
    first, drafted, plain = (
        run.grown(name) for name in ("time_to_first_token_seconds_count", "acceptance_length_sum", "plain_steps_total")
    )
    assert run.grown("generation_tokens_total") == first + drafted + plain
    drafts = run.grown("spec_decode_num_drafts_total")
    assert run.grown("acceptance_length_count") == drafts > 0
    at_position = [run.grown("spec_decode_num_accepted_tokens_per_pos_total", position=str(idx)) for idx in range(4)]
    assert sum(at_position) > 0
    assert all(left >= right for left, right in pairwise([drafts, *at_position]))
    assert run.grown("spec_decode_head_hits_total") == run.grown("spec_decode_accepted_by_source_total", source="head") > 0


def test_prometheus_has_what_the_server_says(run: Run):
    for name in (
        "generation_tokens_total",
        "prompt_tokens_total",
        "request_success_total",
        "engine_steps_total",
        "num_preemptions_total",
    ):
        assert run.grown(name) == run.scrape.value(name)


def test_no_block_is_leaked(run: Run):
    assert run.scrape.value("num_requests_running") == run.scrape.value("num_requests_waiting") == 0
    assert run.scrape.value("kv_cache_usage_perc") == 0
    used = run.prometheus.api.over("medusa_kv_cache_usage_perc", start_s=run.start_s, end_s=run.end_s, step_s=SCRAPE_INTERVAL_S)
    values = [value for line in used for _, value in line.points]
    assert max(values) > 0.1
    assert values[-1] == 0


def test_memory_stays_flat(run: Run):
    assert len(run.memory) > MIXED_S / 2
    middle = len(run.memory) // 2
    assert max(run.memory[middle:]) - max(run.memory[:middle]) < MAX_GROWTH_BYTES


def test_the_drain_loses_nothing(run: Run):
    """The last one: it ends the server."""
    ledger = Ledger()
    body = {"prompt": "Once upon a time", "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(Client(run.server.url, KEY, ledger).read, COMPLETIONS, **body, n=2) for _ in range(3)]
        whole = pool.submit(Client(run.server.url, KEY, ledger).ask, COMPLETIONS, **body)
        # Four of the seven choices run; nothing is lost of those that wait either.
        until(lambda: (scrape := run.server.scrape()).value("num_requests_running") + scrape.value("num_requests_waiting") == 7)
        run.server.process.send_signal(signal.SIGTERM)
        for ended in [*streams, whole]:
            ended.result()
    assert run.server.process.wait(timeout=60) == 0
    assert ledger.surprises == []
    assert ledger.answers == {(COMPLETIONS, 200): 4}
    assert ledger.ended == {"length": 7}
    assert ledger.completion_tokens == 7 * 60
