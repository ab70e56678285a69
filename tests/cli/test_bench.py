"""`medusa bench` as people run it, on a tiny model: every file is written, and what is wrong is said before anything runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import save_file

from medusa_core.bench import latency, plots, throughput
from medusa_core.bench.figures import summarise
from medusa_core.bench.latency import FirstToken
from medusa_core.bench.machine import command_line, git_commit
from medusa_core.bench.records import RequestRecord, RunRecord
from medusa_core.bench.report import read_report, write_report
from medusa_core.bench.server import OfflineReference, ServedRun, ServerPlan
from medusa_core.bench.server_process import ServerFigures
from medusa_core.cli import bench as bench_command
from medusa_core.cli.main import main
from medusa_core.errors import EngineError
from tests.engine.tiny_model import HIDDEN_SIZE, heads_tensors, save_tiny_model

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny model with heads and a chat template."""
    folder = save_tiny_model(tmp_path_factory.mktemp("bench") / "tiny")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    heads = folder / "heads.safetensors"
    save_file(heads_tensors(HIDDEN_SIZE), heads)
    options = ["--model", str(folder), "--heads", str(heads), "--dtype", "float32", "--device", "cpu"]
    return [*options, "--max-model-len", "100", "--num-blocks", "200"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": n, "category": f"category {n % 2}", "turns": [f"question {n}"]} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def bench(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `medusa bench` with these arguments: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medusa", "bench", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        return int(exit_info.value.code or 0), out, err

    return run


def test_throughput_writes_results_report_and_plots(bench, tiny, questions, tmp_path):
    output = tmp_path / "out"
    code, out, err = bench(
        "throughput", "--prompts", str(questions), "--concurrency", "2,1", "--variants", "plain,tree-4,transformers",
        "--max-tokens", "8", "--repeats", "2", "--price-per-gpu-hour", "2", "--output", str(output), *tiny,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((output / "results.json").read_text())
    runs = {(run["variant"], run["concurrency"]): run for run in results["figures"]["runs"]}
    assert set(runs) == {("transformers", 1), ("plain", 1), ("plain", 2), ("tree-4", 1), ("tree-4", 2)}
    assert runs["plain", 1]["num_requests"] == 8
    assert runs["plain", 1]["cost_per_million"] == pytest.approx(2 / 3600 / runs["plain", 1]["tokens_per_s"] * 1e6)
    assert runs["plain", 1]["num_output_tokens"] == runs["tree-4", 2]["num_output_tokens"]
    assert [category["category"] for category in runs["tree-4", 1]["categories"]] == ["category 0", "category 1"]
    assert all(mismatch["first_differences"] == [] for mismatch in results["figures"]["mismatches"])
    assert {m["reference"] for m in results["figures"]["mismatches"]} == {"plain", "transformers"}
    assert results["settings"]["max_tokens"] == 8
    assert results["settings"]["seed"] == 0
    assert results["machine"]["packages"]["torch"]
    assert results["engine"]["model_name"] == "tiny"
    assert results["incomplete"] is None
    report = (output / "report.md").read_text()
    assert out == report + "\n"
    assert "ncomplete" not in report
    assert "| tree-4 | 1 at once |" in report
    for name in ("throughput.png", "inter_token_latency.png", "acceptance_by_category.png"):
        assert f"]({name})" in report
        assert (output / name).read_bytes().startswith(PNG)
    assert bench("render", str(output)) == (0, out, "")


def test_latency_writes_results_report_and_plots(bench, tiny, tmp_path):
    code, out, err = bench(
        "latency", "--lanes", "1,3", "--context-len", "10", "--num-steps", "3", "--prompt-lens", "8,4096",
        "--output", str(tmp_path), "--no-plots", "--no-prompt-lookup", *tiny,
    )  # fmt: skip
    assert code == 0, err
    figures = json.loads((tmp_path / "results.json").read_text())["figures"]
    measured = {(p["num_lanes"], p["num_nodes"], p["sampling"]) for p in figures["steps"] if p["skipped"] is None}
    assert {(1, 1, "greedy"), (3, 16, "greedy"), (3, 16, "T=0.7, top-p 0.9")} <= measured
    assert all(p["step_s"] > 0 and p["floor_share"] > 0 for p in figures["steps"] if p["skipped"] is None)
    assert [(t["num_prompt_tokens"], t["skipped"] is None) for t in figures["first_tokens"]] == [(8, True), (4096, False)]
    assert [(k["num_lanes"], k["num_nodes"]) for k in figures["kernels"]] == [(1, 1), (1, 16), (3, 1), (3, 16)]
    assert "Not measured: 1025 tokens exceed max_model_len (100)." in out
    assert "png" not in out
    results = (tmp_path / "results.json").read_bytes()
    assert bench("render", str(tmp_path))[0] == 0
    assert (tmp_path / "results.json").read_bytes() == results
    assert (tmp_path / "step_time_by_nodes.png").read_bytes().startswith(PNG)
    assert (tmp_path / "report.md").read_text().replace("![step time by nodes](step_time_by_nodes.png)\n\n", "") + "\n" == out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["throughput"], "--prompts"),
        (["throughput", "--synthetic", "8x8", "--prompts", "x"], "--prompts"),
        (["throughput", "--synthetic", "8"], "--synthetic"),
        (["throughput", "--prompts", "/nowhere/questions"], "/nowhere/questions"),
        (["throughput", "--synthetic", "8x8", "--concurrency", "1,x"], "--concurrency"),
        (["throughput", "--synthetic", "8x8", "--concurrency", "1,1"], "--concurrency"),
        (["throughput", "--synthetic", "8x8", "--variants", "fast"], "--variants"),
        (["throughput", "--synthetic", "8x8", "--variants", "plain,transformers", "--temperature", "1"], "greedily"),
        (["throughput", "--synthetic", "8x8", "--variants", "transformers"], "--variants"),
        (["throughput", "--synthetic", "8x8", "--temperature", "3"], "temperature"),
        (["throughput", "--synthetic", "8x8", "--max-tokens", "256"], "--max-tokens"),
        (["throughput", "--synthetic", "8x8", "--top-p", "0.9"], "--top-p"),
        (["throughput", "--synthetic", "8x8", "--variants", "plain", "--tree", "mc_sim_7b_63"], "--tree"),
        (["throughput", "--synthetic", "8x8", "--variants", "plain,tree-4", "--heads", "none", "--no-prompt-lookup"], "--heads"),
        (["throughput", "--synthetic", "8x8", "--tree", "oak"], "oak"),
        (["latency", "--lanes", "0"], "--lanes"),
        (["latency", "--heads", "none", "--tree", "mc_sim_7b_63"], "--heads"),
        (["server", "--url", "localhost", "--synthetic", "8x8"], "--url"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--concurrency", "1", "--request-rate", "2"], "--request-rate"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--extra-body", "[]"], "--extra-body"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--extra-body", '{"temperature": 1}'], "--temperature"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--extra-body", '{"stream": false}'], "stream"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--max-tokens", "8"], "--max-tokens"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--top-p", "0.5"], "--top-p"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--request-rate", "2", "--offline", "x"], "--offline"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--offline", "/nowhere/results"], "/nowhere/results"),
        (["server", "--url", "http://127.0.0.1:9", "--synthetic", "8x8"], "127.0.0.1:9"),
    ],
)
def test_wrong_options_are_one_sentence(bench, tmp_path, arguments, named):
    code, out, err = bench(*arguments, "--output", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith("medusa: ")
    assert named in sentence
    assert sentence.count("/nowhere/") <= 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(bench, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench_command, "build_engine", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = bench("throughput", "--synthetic", "8x8", "--output", str(tmp_path / "file" / "out"))
    assert code == 2
    assert "--output" in err


def test_a_tree_without_heads_is_refused_once_that_is_known(bench, tiny, tmp_path):
    options = ["--synthetic", "8x8", "--tree", "mc_sim_7b_63", "--output", str(tmp_path / "out")]
    at = tiny.index("--heads")
    (Path(tiny[at + 1])).rename(tmp_path / "heads.safetensors")
    try:
        code, _, err = bench("throughput", *options, *tiny[:at], *tiny[at + 2 :])
    finally:
        (tmp_path / "heads.safetensors").rename(tiny[at + 1])
    assert code == 2
    assert err.splitlines()[-1].startswith("medusa: The tree 'mc_sim_7b_63' needs heads")


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


def terminate() -> NoReturn:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # the handler ends it
    pytest.fail("went on")


def fail() -> NoReturn:
    raise EngineError("The engine is on fire.")


@pytest.fixture
def third_run_ends(monkeypatch, tiny, questions, tmp_path) -> Callable[[Callable[[], NoReturn]], list[str]]:
    """Arguments of a benchmark of four runs, the third of which does something else."""

    def arguments(end: Callable[[], NoReturn]) -> list[str]:
        run_closed_loop, num_runs = throughput.run_closed_loop, itertools.count()

        def run(*args: Any, **options: Any) -> RunRecord:
            # warm-ups have no repetition
            if "repetition" in options and next(num_runs) == 2:
                end()
            return run_closed_loop(*args, **options)

        monkeypatch.setattr(throughput, "run_closed_loop", run)
        return ["throughput", "--prompts", str(questions), "--concurrency", "1,2", "--max-tokens", "4", "--repeats", "1",
                "--variants", "plain,tree-4", "--output", str(tmp_path / "out"), *tiny]  # fmt: skip

    return arguments


@pytest.mark.parametrize(("end", "expected"), [(interrupt, 130), (terminate, 143)])
def test_an_interrupted_benchmark_keeps_what_it_measured(bench, third_run_ends, tmp_path, end, expected):
    output = tmp_path / "out"
    handler = signal.getsignal(signal.SIGTERM)
    code, out, err = bench(*third_run_ends(end))
    assert code == expected
    assert err.splitlines()[-1] == f"medusa: interrupted; incomplete: 2 of 4 runs; the report is in {output}."
    results = json.loads((output / "results.json").read_text())
    assert results["incomplete"] == "2 of 4 runs"
    assert [(run["variant"], run["concurrency"]) for run in results["figures"]["runs"]] == [("plain", 1), ("tree-4", 1)]
    assert len(results["figures"]["ratios"]) == len(results["figures"]["mismatches"]) == 1
    assert results["engine"]["model_name"] == "tiny"
    assert "**Incomplete: 2 of 4 runs.**" in out
    assert out == (output / "report.md").read_text() + "\n"
    assert (output / "throughput.png").read_bytes().startswith(PNG)
    assert sorted(path.suffix for path in output.iterdir() if path.suffix != ".png") == [".json", ".md"]
    assert bench("render", str(output)) == (0, out, "")
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_benchmark_that_fails_has_written_what_came_before(bench, third_run_ends, tmp_path):
    code, out, err = bench(*third_run_ends(fail))
    assert (code, out) == (2, "")
    assert err.splitlines()[-2:] == [
        f"medusa: failed; incomplete: 2 of 4 runs; the report is in {tmp_path / 'out'}.",
        "medusa: The engine is on fire.",
    ]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["incomplete"] == "2 of 4 runs"
    assert "**Incomplete: 2 of 4 runs.**" in (tmp_path / "out" / "report.md").read_text()


def test_an_interrupt_before_the_first_figure_writes_nothing(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_command, "build_engine", lambda *_, **__: interrupt())
    code, out, err = bench("throughput", "--synthetic", "8x8", "--output", str(tmp_path))
    assert (code, out) == (130, "")
    assert "nothing was measured yet" in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_latency_benchmark_names_the_missing_sections(bench, monkeypatch, tiny, tmp_path):
    measure_first_tokens = latency.measure_first_tokens

    def first_of(*args: Any, **options: Any) -> Iterator[FirstToken]:
        yield next(measure_first_tokens(*args, **options))
        interrupt()

    monkeypatch.setattr(latency, "measure_first_tokens", first_of)
    code, out, _ = bench(
        "latency", "--lanes", "1", "--context-len", "8", "--num-steps", "3", "--prompt-lens", "4,8", "--no-plots",
        "--output", str(tmp_path), *tiny,
    )  # fmt: skip
    assert code == 130
    # arrivals do not fit the tiny model's context, so they are not missing
    assert "**Incomplete: 1 of 2 first tokens.**" in out
    assert "| 4 |" in out
    assert bench("render", str(tmp_path))[0] == 0


def test_an_interrupted_server_benchmark_beside_an_incomplete_offline_run(bench, monkeypatch, tmp_path):
    def first_of(plan: ServerPlan, questions: Any, *, offline: OfflineReference, progress: bool) -> Iterator[list[ServedRun]]:
        record = RequestRecord(prompt_idx=0, category="", start_s=0.0, end_s=1.0, num_output_tokens=5)
        figures = summarise([RunRecord(variant="server", concurrency=1, repetition=0, requests=[record])])
        server = ServerFigures(frontend_cpu_s=None, frontend_us_per_frame=None, acceptance_length=None)
        yield [ServedRun(figures=figures, server=server, offline_tokens_per_s=10.0, offline_share=0.5)]
        interrupt()

    monkeypatch.setattr(bench_command, "run_server", first_of)
    offline = tmp_path / "offline.json"
    runs = [{"variant": "plain", "concurrency": 1, "tokens_per_s": 10.0}]
    offline.write_text(json.dumps({"figures": {"runs": runs}, "incomplete": "1 of 4 runs"}))
    arguments = ["server", "--url", "http://127.0.0.1:9", "--served-model", "m", "--synthetic", "8x8", "--offline", str(offline)]
    code, out, _ = bench(*arguments, "--num-prompts", "2", "--repeats", "2", "--no-plots", "--output", str(tmp_path / "out"))
    assert code == 130
    assert "**Incomplete: 1 of 6 runs.**" in out
    assert "50 % of 10" in out
    assert "The offline run is incomplete: 1 of 4 runs." in out
    assert "There are 2 prompts" in out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["incomplete"] == "1 of 6 runs"
    code, _, err = bench(*arguments, "--concurrency", "2", "--output", str(tmp_path / "none"))
    assert code == 2
    assert "none of the loads of --concurrency. It holds 1." in err


def test_a_report_is_replaced_as_a_whole(bench, third_run_ends, monkeypatch, tmp_path):
    bench(*third_run_ends(fail))
    before = (tmp_path / "out" / "results.json").read_bytes()
    report = read_report(tmp_path / "out")
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (path.open("wb").write(data[:9]), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_report(dataclasses.replace(report, incomplete="3 of 4 runs"), tmp_path / "out", has_plots=False)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_prompts_that_do_not_fit_the_context_are_refused_before_the_run(bench, tiny, tmp_path):
    code, _, err = bench("throughput", "--synthetic", "90x20", "--num-prompts", "2", "--output", str(tmp_path), *tiny)
    assert code == 2
    assert "synthetic 0 has 90 tokens" in err


def test_without_matplotlib_nothing_runs(bench, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    code, _, err = bench("throughput", "--prompts", "/nowhere", "--output", str(tmp_path / "out"))
    assert code == 2
    assert 'pip install ".[bench]"' in err
    assert not (tmp_path / "out").exists()


def test_the_key_is_not_written_down(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/medusa", "bench", "server", "--api-key", "secret", "--api-key=secret", "--url", "u"])
    assert command_line() == "medusa bench server --api-key ... --api-key=... --url u"


def test_a_folder_in_no_working_tree_has_no_commit(tmp_path):
    assert git_commit(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "speed", "figures": {}}', '{"kind": "latency", "figures": {"steps": 1}}'])
def test_only_results_can_be_rendered(bench, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    code, _, err = bench("render", str(tmp_path))
    assert code == 2
    assert "results.json holds no results" in err


def test_a_folder_that_is_not_there_is_not_made_to_be_rendered(bench, tmp_path):
    assert bench("render", str(tmp_path / "none"))[0] == 2
    assert not (tmp_path / "none").exists()
