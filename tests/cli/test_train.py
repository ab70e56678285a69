"""`medusa train` as people run it, on a tiny model: stopped and run again, with data and without, and what it writes is served."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from contextlib import nullcontext

import pytest
from safetensors import safe_open

from medusa_core.cli import train as train_command
from medusa_core.cli.main import main
from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.build import build_engine
from tests.engine.tiny_model import save_tiny_model
from tests.training.test_samples import TEMPLATE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options that name a tiny model with a chat template."""
    folder = save_tiny_model(tmp_path_factory.mktemp("train") / "tiny", max_position_embeddings=512)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return ["--model", str(folder), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"answer {n}"}]} for n in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, [*lines, {"text": "a text " * 30}])))
    return path


@pytest.fixture
def train(monkeypatch, capsys):
    """Run `medusa train` with these arguments: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["medusa", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        return int(exit_info.value.code or 0), out, err

    return run


MEDUSA = ["--independent", "--mlp-size", "0"]
FAST = ["--epochs", "2", "--row-len", "64", "--rows-per-update", "4", "--num-heads", "3", "--draft-vocab-size", "64", *MEDUSA]


def test_heads_are_trained_logged_and_served(train, tiny, data, tmp_path):
    output = tmp_path / "out"
    code, out, err = train("--data", data, "--output", output, *FAST, *tiny)
    assert code == 0, err
    assert "| 3 |" in out
    heads = output / "medusa_lm_head.safetensors"
    with safe_open(heads, framework="pt") as file:
        assert set(file.keys()) == {f"{k}.0.linear.{name}" for k in range(3) for name in ("weight", "bias")} | {"token_map"}
        assert file.metadata() == {"base_model": "tiny"}
    with (output / "training.csv").open(newline="") as file:
        updates = [int(row["update"]) for row in csv.DictReader(file)]
    assert updates == list(range(1, len(updates) + 1))
    with (output / "accuracy.csv").open(newline="") as file:
        accuracies = list(csv.DictReader(file))
    assert [int(row["head"]) for row in accuracies[-3:]] == [1, 2, 3]
    assert {int(row["update"]) for row in accuracies[-3:]} == {updates[-1]}
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")

    model = ModelConfig(model=tiny[1], heads=str(output), dtype="float32", device="cpu")
    core = build_engine(EngineConfig(model=model, cache=CacheConfig(num_blocks=200), scheduler=SchedulerConfig(max_num_seqs=1)))
    assert core.info.num_heads == 3


def test_a_model_trained_with_its_heads_is_served_from_its_own_folder(train, tiny, data, tmp_path):
    output = tmp_path / "out"
    code, out, err = train(
        "--data", data, "--output", output, *FAST, "--joint-epochs", "1", "--lora-rank", "2", "--no-plots", *tiny
    )
    assert code == 0, err
    assert "The model says what it said before training for" in out
    assert f"medusa calibrate --model {output / 'model'} --prompts" in out
    with safe_open(output / "model" / "medusa_lm_head.safetensors", framework="pt") as file:
        assert file.metadata() == {"base_model": "tiny, trained with these heads"}
    model = ModelConfig(model=str(output / "model"), dtype="float32", device="cpu")
    core = build_engine(EngineConfig(model=model, cache=CacheConfig(num_blocks=200), scheduler=SchedulerConfig(max_num_seqs=1)))
    assert core.info.num_heads == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-rank", "4"], "Add --joint-epochs"),
        (["--rank", "4"], "Add --markov"),
        (["--sequential"], "gated blocks"),
        (["--share-blocks"], "would all guess the same"),
        (["--output-layer", "own", "--markov"], "Markov term"),
    ],
)
def test_shapes_that_make_no_sense_are_refused_before_anything_is_loaded(train, tiny, data, tmp_path, arguments, message):
    code, _, err = train("--data", data, "--output", tmp_path / "out", *FAST, *arguments, *tiny)
    assert code == 2
    assert message in err


def test_a_trained_model_is_never_written_over_another(train, tiny, data, tmp_path):
    joint = ["--data", data, *FAST, "--joint-epochs", "1", "--no-plots"]
    (tmp_path / "taken" / "model").mkdir(parents=True)
    code, _, err = train("--output", tmp_path / "taken", *joint, *tiny)
    assert code == 2
    assert "was not made here" in err
    here = tmp_path / "here"
    shutil.copytree(tiny[1], here / "model")
    (here / "checkpoint.pt").touch()
    code, _, err = train("--output", here, *joint, "--model", here / "model", *tiny[2:])
    assert code == 2
    assert "written over the one it is made from" in err


def test_a_joint_run_that_was_stopped_writes_no_heads_for_a_model_that_is_nowhere(train, tiny, data, tmp_path, monkeypatch):
    calls = iter(range(100))
    monkeypatch.setattr(train_command, "_stop_asked_for", lambda _: nullcontext(lambda: next(calls) >= 1))
    output = tmp_path / "out"
    code, out, err = train("--data", data, "--output", output, *FAST, "--joint-epochs", "1", "--no-plots", *tiny)
    assert code == 0, err
    assert "stopped before the end, where model and heads are written" in out
    assert not list(output.glob("**/medusa_lm_head.safetensors"))


def test_without_peft_nothing_is_begun(train, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = train("--output", tmp_path / "out", *FAST, "--joint-epochs", "1", "--no-plots", *tiny)
    assert code == 2
    assert "need the package peft" in err
    assert not (tmp_path / "out").exists()


def test_a_row_of_the_log_that_a_crash_has_cut_short_is_dropped(train, tiny, data, tmp_path):
    arguments = ["--data", data, "--output", tmp_path, *FAST, "--no-plots", *tiny]
    assert train(*arguments)[0] == 0
    whole = (tmp_path / "accuracy.csv").read_bytes()
    with (tmp_path / "accuracy.csv").open("a") as file:
        file.write("7,")
    code, _, err = train(*arguments)
    assert code == 0, err
    assert (tmp_path / "accuracy.csv").read_bytes() == whole


def test_heads_of_our_own_shape_in_eight_bits(train, tiny, data, tmp_path):
    output = tmp_path / "out"
    fast = FAST[: -len(MEDUSA)]
    code, _, err = train("--data", data, "--output", output, *fast, "--markov", "--rank", "4", "--int8", "--no-plots", *tiny)
    assert code == 0, err
    with safe_open(output / "medusa_lm_head.safetensors", framework="pt") as file:
        assert {"blocks.0.0.gate_up.weight", "blocks.0.0.gate_up.weight_scale", "markov.weight", "token_map"} <= set(file.keys())
    model = ModelConfig(model=tiny[1], heads=str(output), dtype="float32", device="cpu")
    core = build_engine(EngineConfig(model=model, cache=CacheConfig(num_blocks=200), scheduler=SchedulerConfig(max_num_seqs=1)))
    assert core.info.num_heads == 3


def test_a_stopped_run_goes_on_with_the_same_command(train, tiny, data, tmp_path, monkeypatch):
    arguments = ["--data", data, *FAST, "--no-plots", *tiny]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert train("--output", whole, *arguments)[0] == 0
    calls = iter(range(100))
    monkeypatch.setattr(
        train_command, "_stop_asked_for", lambda minutes: nullcontext(lambda: minutes is not None and next(calls) >= 3)
    )
    code, out, _ = train("--output", pieces, "--max-minutes", "1", *arguments)
    assert code == 0
    assert "stopped before the end" in out
    code, out, _ = train("--output", pieces, *arguments)
    assert code == 0
    assert "stopped before the end" not in out
    name = "medusa_lm_head.safetensors"
    assert (pieces / name).read_bytes() == (whole / name).read_bytes()

    def losses(folder):
        with (folder / "training.csv").open(newline="") as file:
            return [row["loss"] for row in csv.DictReader(file)]

    assert losses(pieces) == losses(whole)


@pytest.mark.long
def test_without_data_the_model_writes_its_own(train, tiny, tmp_path):
    output = tmp_path / "out"
    arguments = ["--output", output, "--num-tokens", "200", "--max-num-seqs", "32", *FAST, "--no-plots", *tiny]
    code, out, _ = train(*arguments, "--max-minutes", "0")
    assert code == 0
    assert "stopped while conversations were written" in out
    code, out, err = train(*arguments)
    assert code == 0, err
    assert list((output / "conversations").glob("round-*.jsonl"))
    assert (output / "medusa_lm_head.safetensors").exists()
    # Complete as they are, they belong to this model and these options.
    code, _, err = train(*arguments, "--seed", "9")
    assert code == 2
    assert "written with other options (see origin.json)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--cross-entropy", "0", "--distillation", "0"], "one must be positive"),
        (["--ema-decay", "1"], r"ema_decay in \[0, 1\)"),
        (["--total-variation", "inf"], "must be numbers"),
        (["--data", "x.jsonl", "--num-tokens", "5"], r"--num-tokens is about conversations.*--data gives others"),
    ],
)
def test_what_makes_no_sense_is_refused(train, tiny, tmp_path, arguments, message):
    code, _, err = train("--output", tmp_path / "out", *arguments, *FAST, "--no-plots", *tiny)
    assert code == 2
    assert re.search(message, err)


def test_going_on_with_other_options_is_refused(train, tiny, data, tmp_path):
    arguments = ["--data", data, "--output", tmp_path / "out", *FAST, "--no-plots", *tiny]
    assert train(*arguments)[0] == 0
    code, _, err = train(*arguments, "--learning-rate", "0.1")
    assert code == 2
    assert re.search(r"another learning_rate \(0\.001, now 0\.1\).*another --output to start anew", err)


def test_ctrl_c_stops_at_the_next_good_place(train, tiny, data, tmp_path, monkeypatch):
    """The first one: the update is finished, saved, and heads are written."""
    step = train_command.TrainingLog.write

    def write(log, progress):
        step(log, progress)
        if progress.update == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_command.TrainingLog, "write", write)
    output = tmp_path / "out"
    before = signal.getsignal(signal.SIGINT)
    code, out, err = train("--data", data, "--output", output, *FAST, "--no-plots", *tiny)
    assert code == 0, err
    assert "2 of " in out
    assert "stopped before the end" in out
    assert "once more to stop at once" in err
    assert (output / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_somebody_elses_heads_are_not_overwritten(train, tiny, data, tmp_path):
    heads = tmp_path / "medusa_lm_head.safetensors"
    heads.write_bytes(b"published")
    code, _, err = train("--data", data, "--output", tmp_path, *FAST, "--no-plots", *tiny)
    assert code == 2
    assert "was not made here" in err
    assert heads.read_bytes() == b"published"


def test_a_row_longer_than_the_context_is_refused_and_never_the_default(train, tiny, data, tmp_path):
    fast = FAST[:2] + FAST[4:]
    code, _, err = train("--data", data, "--output", tmp_path / "a", *fast, "--row-len", "513", "--no-plots", *tiny)
    assert code == 2
    assert "exceeds the model's context of 512" in err
    code, _, err = train("--data", data, "--output", tmp_path / "b", *fast, "--no-plots", *tiny)
    assert code == 0, err


def test_what_is_trained_is_calibrated_and_served_from_its_folder(train, tiny, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    _, out, _ = train("--data", data, "--output", output, *FAST, "--no-plots", *tiny)
    command = re.search(r"next: medusa (calibrate --model \S+ --heads \S+) --prompts", out)[1].split()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"question_id": 1, "category": "any", "turns": ["q3"]}))
    monkeypatch.setattr(sys, "argv", ["medusa", *command, "--prompts", str(prompts), "--dtype", "float32", "--no-plots"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code, capsys.readouterr().err
    for heads in (output, output / "medusa_lm_head.safetensors"):
        model = ModelConfig(model=tiny[1], heads=str(heads), dtype="float32", device="cpu")
        core = build_engine(EngineConfig(model=model, cache=CacheConfig(num_blocks=200), scheduler=SchedulerConfig(max_num_seqs=1)))
        assert core.info.tree == "calibrated+lookup"
