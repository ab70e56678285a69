"""What cannot be served ends with exit code 2 and one sentence, never with a traceback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

from medusa_core.model.demo import demo_heads_path
from tests.e2e.server_process import COMMAND, ROOT, START_TIMEOUT_S, environment

HIDDEN_SIZE = 48


def start(*flags: str) -> str:
    """The sentence a start with these flags ends with."""
    done = subprocess.run(
        [*COMMAND, "--port", "0", *flags], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=START_TIMEOUT_S
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("medusa-server: ")
    return sentence


@pytest.fixture
def heads_of_another_model(tmp_path: Path) -> Path:
    """One head in the published layout, for a model of another width."""
    path = tmp_path / "heads.safetensors"
    block, projection = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, 200, bias=False)
    save_file({"0.0.linear.weight": block.weight, "0.0.linear.bias": block.bias, "0.1.weight": projection.weight}, path)
    return path


@pytest.mark.demo
def test_heads_of_another_model(heads_of_another_model: Path):
    sentence = start("--heads", str(heads_of_another_model))
    assert str(HIDDEN_SIZE) in sentence
    assert "896" in sentence


@pytest.mark.long
def test_a_truncated_gguf(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(10))
    assert str(path) in start("--model", str(path))


def test_an_unknown_tree():
    sentence = start("--tree", "mc_sim_8b_64")
    assert "mc_sim_8b_64" in sentence
    assert "mc_sim_7b_63" in sentence


def test_a_missing_model():
    assert "/nowhere/model" in start("--model", "/nowhere/model")


@pytest.mark.long
def test_a_heads_file_as_the_model():
    assert "config.json" in start("--model", str(demo_heads_path()))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--dtype", "int3"), "--dtype"),
        (("--max-num-seqs", "0"), "max_num_seqs"),
        (("--tree-size", "65"), "tree_size"),
        (("--speed", "11"), "--speed"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_wrong_options(flags, name):
    assert name in start(*flags)
