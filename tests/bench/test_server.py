"""Load processes against a scripted server, and what is seen of a server from outside."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from medusa_core.bench.http_stream import Address
from medusa_core.bench.load import poisson_arrivals_s
from medusa_core.bench.prompts import Question
from medusa_core.bench.server import OfflineReference, ServerPlan, first_served_model, frontend_pids, read_offline, run_server
from medusa_core.bench.server_process import (
    ServerView,
    compare_views,
    find_listeners,
    parse_metrics,
    process_cpu_s,
)
from medusa_core.errors import ConfigError, EngineError
from tests.bench.stub_server import Script, StubServer, chat_frames, chunked, plain, serving

QUESTIONS = [Question(str(number), "qa" if number % 2 else "math", f"prompt {number}") for number in range(6)]
METRICS = """# HELP x
medusa_acceptance_length_bucket{le="1"} 5
medusa_acceptance_length_sum{model_name="m"} %d
medusa_acceptance_length_count{model_name="m"} %d
"""


class ThreadedStub:
    """A stub server in a thread, as load processes need one beside the test."""

    def __init__(self) -> None:
        self.failing_prompts: set[str] = set()
        self.num_metrics = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with serving(self._answer) as self.stub:
            self._ready.set()
            await self._stop.wait()

    def _answer(self, number: int) -> Script:
        head, body = self.stub.requests[number]
        if head.startswith("GET /v1/models"):
            return plain("200 OK", b'{"data": [{"id": "stub"}]}')
        if head.startswith("GET /metrics"):
            self.num_metrics += 1
            return plain("200 OK", (METRICS % (30 * self.num_metrics, 10 * self.num_metrics)).encode())
        prompt = json.loads(body)["messages"][0]["content"]
        if prompt in self.failing_prompts:
            return plain("503 Service Unavailable", b'{"error": {"message": "busy"}}')
        return chunked(*chat_frames("a", "b", "c"))


@pytest.fixture
def server() -> Iterator[ThreadedStub]:
    stub = ThreadedStub()
    stub.start()
    yield stub
    stub.close()


def make_plan(stub: StubServer, **options: object) -> ServerPlan:
    defaults = {"model": "stub", "max_tokens": 20, "num_processes": 2, "extra": {"temperature": 0}}
    return ServerPlan(address=Address("127.0.0.1", stub.port), **{**defaults, **options})


def test_a_closed_loop_sends_every_prompt_once_per_repetition(server):
    plan = make_plan(server.stub, concurrency=(3,), repeats=2)
    *_, (run,) = run_server(plan, QUESTIONS, offline=None, progress=False)
    figures = run.figures
    assert (figures.num_requests, figures.num_errors, figures.num_output_tokens) == (12, 0, 60)
    assert (figures.concurrency, figures.num_repetitions, figures.num_frames) == (3, 2, 12 * 7)
    assert figures.itl_frame_s.count == 12 * 2
    assert [(c.category, c.num_requests) for c in figures.categories] == [("math", 6), ("qa", 6)]
    assert run.server.acceptance_length == 3.0
    bodies = [json.loads(body) for _, body in server.stub.requests if body]
    counted = [body["messages"][0]["content"] for body in bodies if body["max_tokens"] == 20]
    assert sorted(counted) == sorted(2 * [question.text for question in QUESTIONS])
    assert all(body["temperature"] == 0 and body["stream"] for body in bodies)
    assert sum(body["max_tokens"] == 16 for body in bodies) == 3  # the warm-up


def test_figures_of_all_loads_so_far_come_after_each_run(server):
    plan = make_plan(server.stub, concurrency=(2, 3), repeats=2)
    so_far = list(run_server(plan, QUESTIONS, offline=None, progress=False))
    found = [[(run.figures.concurrency, run.figures.num_repetitions) for run in runs] for runs in so_far]
    assert found == [[(2, 1)], [(2, 2)], [(2, 2), (3, 1)], [(2, 2), (3, 2)]]
    assert plan.num_runs == len(so_far)


def test_errors_are_counted_and_shown(server):
    server.failing_prompts = {"prompt 4", "prompt 5"}
    *_, (run,) = run_server(make_plan(server.stub, concurrency=(2,)), QUESTIONS, offline=None, progress=False)
    assert run.figures.errors == {"HTTP 503: busy": 2}
    assert (run.figures.num_requests, run.figures.num_output_tokens) == (6, 20)


def test_an_open_loop_sends_at_the_times_of_arrival(server):
    plan = make_plan(server.stub, request_rate=100.0)
    *_, (run,) = run_server(plan, QUESTIONS, offline=None, progress=False)
    assert (run.figures.concurrency, run.figures.request_rate, run.figures.num_requests) == (None, 100.0, 6)
    assert run.figures.seconds >= poisson_arrivals_s(6, 100.0, 0)[-1]


def test_a_server_that_answers_nothing_stops_the_benchmark(server):
    server.failing_prompts = {question.text for question in QUESTIONS}
    with pytest.raises(EngineError, match=r"answered no request.*busy"):
        next(run_server(make_plan(server.stub, concurrency=(2,)), QUESTIONS, offline=None, progress=False))


def test_the_share_of_the_offline_figure(server, tmp_path):
    path = tmp_path / "results.json"
    runs = [
        {"variant": "plain", "concurrency": 2, "tokens_per_s": 1.0},
        {"variant": "speculation", "concurrency": 2, "tokens_per_s": 1e6},
    ]
    path.write_text(json.dumps({"figures": {"runs": runs}}))
    *_, (run, alone) = run_server(make_plan(server.stub, concurrency=(2, 3)), QUESTIONS, offline=read_offline(path), progress=False)
    assert run.offline_tokens_per_s == 1e6
    assert run.offline_share == run.figures.tokens_per_s / 1e6
    assert alone.offline_share is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"figures": {"runs": []}}', '{"figures": {"runs": [{"variant": "plain"}]}}'])
def test_files_that_are_no_offline_results(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--offline"):
        read_offline(path)


def test_an_offline_run_of_something_else_says_so():
    reference = OfflineReference(variant="plain", tokens_per_s={}, settings={"max_tokens": 64, "seed": 0, "repeats": 5})
    assert reference.differences({"max_tokens": 64, "seed": 0, "repeats": 1}) == []
    assert reference.differences({"max_tokens": 256, "seed": 0}) == ["max_tokens was 64, not 256"]


def test_the_first_model_of_the_list_is_asked(server):
    assert first_served_model(Address("127.0.0.1", server.stub.port), api_key=None) == "stub"


def test_arrivals_follow_the_seed_and_the_rate():
    times = poisson_arrivals_s(2000, 50.0, seed=1)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times == poisson_arrivals_s(2000, 50.0, seed=1)
    assert 2000 / times[-1] == pytest.approx(50.0, rel=0.1)


def test_the_process_behind_a_port_is_found():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert find_listeners(port) == [os.getpid()]
        assert frontend_pids(Address("localhost", port), None) == (os.getpid(),)
    assert find_listeners(port) == []
    assert frontend_pids(Address("192.0.2.1", port), None) == ()


def test_cpu_seconds_are_read_behind_any_name(tmp_path):
    folder = tmp_path / "7"
    folder.mkdir()
    fields = ["S", *(["0"] * 10), "200", "100", "99999", "99999"]
    (folder / "stat").write_text("7 (a) (b c) " + " ".join(fields))
    assert process_cpu_s(7, tmp_path) == 300 / os.sysconf("SC_CLK_TCK")
    with pytest.raises(ConfigError, match="--server-pid 8"):
        process_cpu_s(8, tmp_path)
    assert process_cpu_s(os.getpid()) > 0


def test_metrics_are_summed_over_labels_without_buckets():
    text = 'a_total{x="1"} 2\na_total{x="2"} 3.5\n# TYPE a counter\nb 1e3 1700000000\nc_bucket{le="1"} 9\nd NaN\nbad line here x\n'
    metrics = parse_metrics(text)
    assert (metrics["a_total"], metrics["b"]) == (5.5, 1000.0)
    assert "c_bucket" not in metrics


def test_front_end_time_per_frame_and_acceptance_between_two_views():
    before = ServerView(cpu_s=1.0, metrics={"medusa_acceptance_length_sum": 10.0, "medusa_acceptance_length_count": 10.0})
    after = ServerView(cpu_s=1.5, metrics={"medusa_acceptance_length_sum": 35.0, "medusa_acceptance_length_count": 20.0})
    figures = compare_views(before, after, 5000)
    assert figures.frontend_us_per_frame == pytest.approx(100.0)
    assert figures.acceptance_length == 2.5
    unknown = compare_views(ServerView(cpu_s=None, metrics={}), ServerView(cpu_s=None, metrics={}), 10)
    assert (unknown.frontend_us_per_frame, unknown.acceptance_length) == (None, None)
    vllm = {"vllm:spec_decode_num_drafts_total": 10.0, "vllm:spec_decode_num_accepted_tokens_total": 5.0}
    assert compare_views(ServerView(cpu_s=None, metrics={}), ServerView(cpu_s=None, metrics=vllm), 1).acceptance_length == 1.5


def test_load_processes_need_no_torch():
    code = "import sys, medusa_core.bench.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
