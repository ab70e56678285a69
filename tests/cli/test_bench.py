"""`medusa bench` as people run it, on a tiny model: every file is written, and what is wrong is said before anything runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from medusa_core.bench import plots
from medusa_core.bench.machine import command_line, git_commit
from medusa_core.cli.main import main
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
    report = (output / "report.md").read_text()
    assert out == report + "\n"
    assert "| tree-4 | 1 at once |" in report
    for name in ("throughput.png", "inter_token_latency.png", "acceptance_by_category.png"):
        assert f"]({name})" in report
        assert (output / name).read_bytes().startswith(PNG)
    assert bench("render", str(output)) == (0, out, "")


def test_latency_writes_results_report_and_plots(bench, tiny, tmp_path):
    code, out, err = bench(
        "latency", "--lanes", "1,3", "--context-len", "10", "--num-steps", "3", "--prompt-lens", "8,4096",
        "--output", str(tmp_path), "--no-plots", *tiny,
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
        (["latency", "--lanes", "0"], "--lanes"),
        (["server", "--url", "localhost", "--synthetic", "8x8"], "--url"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--concurrency", "1", "--request-rate", "2"], "--request-rate"),
        (["server", "--url", "http://x", "--synthetic", "8x8", "--extra-body", "[]"], "--extra-body"),
        (["server", "--url", "http://127.0.0.1:9", "--synthetic", "8x8"], "127.0.0.1:9"),
    ],
)
def test_wrong_options_are_one_sentence(bench, tmp_path, arguments, named):
    code, out, err = bench(*arguments, "--output", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith("medusa: ")
    assert named in sentence


def test_prompts_that_do_not_fit_the_context_are_refused_before_the_run(bench, tiny, tmp_path):
    code, _, err = bench("throughput", "--synthetic", "90x20", "--num-prompts", "2", "--output", str(tmp_path), *tiny)
    assert code == 2
    assert "synthetic 0 has 90 tokens" in err


def test_without_matplotlib_nothing_runs(bench, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    code, _, err = bench("throughput", "--prompts", "/nowhere", "--output", str(tmp_path / "out"))
    assert code == 2
    assert "medusa-server[bench]" in err
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
