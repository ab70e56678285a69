"""`medusa calibrate` as people run it, on a tiny model: the file it writes is the one that the engine then loads."""

from __future__ import annotations

import json
import re
import sys

import pytest
from safetensors.torch import save_file

from medusa_core.cli.main import main
from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.build import build_engine
from medusa_core.model.calibration import load_calibration
from tests.engine.tiny_model import HIDDEN_SIZE, heads_tensors, save_tiny_model


@pytest.fixture
def tiny(tmp_path):
    """(options that name a tiny model and its heads, the heads)."""
    folder = save_tiny_model(tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    heads = tmp_path / "heads.safetensors"
    save_file(heads_tensors(HIDDEN_SIZE), heads)
    options = ["--model", str(folder), "--heads", str(heads), "--dtype", "float32", "--device", "cpu", "--max-model-len", "100"]
    return options, heads


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": n, "category": f"kind {n % 2}", "turns": [f"question {n}"]} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `medusa calibrate` with these arguments: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["medusa", "calibrate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        return int(exit_info.value.code or 0), out, err

    return run


def test_the_tree_it_writes_is_the_one_the_engine_offers(run, tiny, questions):
    options, heads = tiny
    code, out, err = run("--prompts", questions, "--max-tokens", "30", *options)
    assert code == 0, err
    path = heads.with_name("heads.calibration.json")
    calibration = load_calibration(path)
    assert "6 prompts of questions.jsonl" in calibration.source
    assert f"{calibration.num_tokens:,} positions" in out
    assert "| kind 0 |" in out
    assert "| kind 1 |" in out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    model = ModelConfig(model=options[1], heads=str(heads), dtype="float32", device="cpu", max_model_len=100)
    core = build_engine(EngineConfig(model=model, cache=CacheConfig(num_blocks=100), scheduler=SchedulerConfig(max_num_seqs=1)))
    assert core.info.tree == "calibrated+lookup"
    assert core.info.tree_sizes[-1] == calibration.lookup_tree.num_nodes


def test_another_file_can_be_named(run, tiny, questions, tmp_path):
    options, heads = tiny
    output = tmp_path / "other.json"
    arguments = ("--prompts", questions, "--num-prompts", "2", "--max-tokens", "8", "--no-plots", "--output", output)
    code, _, err = run(*arguments, *options)
    assert code == 0, err
    assert load_calibration(output).tree is not None
    assert not heads.with_name("heads.calibration.json").exists()
    assert not output.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "none"], "nothing to calibrate"),
        ([], "bundled heads are calibrated already"),
        (["--output", "x.json", "--num-prompts", "7"], r"7, but .* holds 6 questions"),
    ],
)
def test_what_cannot_be_measured_is_refused(run, questions, arguments, message):
    code, _, err = run("--prompts", questions, *arguments)
    assert code == 2
    assert re.search(message, err)
