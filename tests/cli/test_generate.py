"""`medusa generate` as people run it: in this process on a tiny model, in one of its own on the demo model."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from medusa_core.cli import generate as generate_module
from medusa_core.cli.main import main
from medusa_core.cli.run import RunReport
from tests.engine.tiny_model import HIDDEN_SIZE, NUM_HEADS, heads_tensors, save_tiny_model

ROOT = Path(__file__).parents[2]
# A bound against hanging: up to three loads of the demo model.
TIMEOUT_S = 400
FIGURES = re.compile(
    r"\[\d+ tokens in [\d.]+ s · [\d.]+ tokens/s · first token after [\d.]+ s · \d+ steps( · acceptance length [\d.]+)?"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny model with heads."""
    folder = save_tiny_model(tmp_path_factory.mktemp("generate") / "tiny")
    heads = folder / "heads.safetensors"
    save_file(heads_tensors(HIDDEN_SIZE), heads)
    options = ["--model", str(folder), "--heads", str(heads), "--dtype", "float32", "--device", "cpu", "--raw"]
    return [*options, "--max-model-len", "100", "--max-tokens", "20", "--tree-size", "8"]


@pytest.fixture
def medusa(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `medusa` with these arguments: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medusa", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        return int(exit_info.value.code or 0), out, err

    return run


def test_generate_prints_text_and_figures(medusa, tiny):
    code, out, _ = medusa("generate", "hello", *tiny)
    assert code == 0
    assert f"tiny, float32 on cpu, {NUM_HEADS} heads, tree mc_sim_7b_63+lookup, size 8]" in out
    assert FIGURES.search(out)


def test_the_prompt_can_come_from_standard_input(medusa, tiny, monkeypatch):
    _, expected, _ = medusa("generate", "hello", *tiny)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    _, actual, _ = medusa("generate", "-", *tiny)
    assert actual.split("\n\n[")[0] == expected.split("\n\n[")[0]


def test_without_speculation_the_text_is_the_same(medusa, tiny):
    _, speculative, _ = medusa("generate", "hello", *tiny)
    _, plain, _ = medusa("generate", "hello", *tiny, "--no-speculation")
    assert plain.split("\n\n[")[0] == speculative.split("\n\n[")[0]
    assert "acceptance length" in speculative
    assert "acceptance length" not in plain


@pytest.mark.parametrize("temperature", ["0", "1.0"])
def test_compare_finds_equal_tokens(medusa, tiny, temperature):
    code, out, _ = medusa("generate", "hello", *tiny, "--compare", "--temperature", temperature)
    assert code == 0
    assert re.search(r"\[compare: all \d+ tokens are equal\]", out)
    assert len(FIGURES.findall(out.replace("with speculation: ", "").replace("without: ", ""))) == 2


@pytest.fixture
def wrong_with_speculation(monkeypatch) -> None:
    """Plants a wrong third token into the run with speculation."""
    run_prompt = generate_module.run_prompt

    async def run_wrongly(config, *arguments, **options):
        report, prompt_token_ids, info = await run_prompt(config, *arguments, **options)
        if config.speculation.enabled:
            report.token_ids[2] = (report.token_ids[2] + 1) % 256 + 3
        assert isinstance(report, RunReport)
        return report, prompt_token_ids, info

    monkeypatch.setattr(generate_module, "run_prompt", run_wrongly)


@pytest.mark.parametrize(
    ("dtype", "verdict"),
    [("float32", "FAILED, the outputs differ from token 2"), ("bfloat16", "FAILED, not a near-tie: the first 2")],
)
def test_compare_fails_for_a_wrong_token(medusa, tiny, wrong_with_speculation, dtype, verdict):
    code, out, _ = medusa("generate", "hello", *tiny, "--compare", "--dtype", dtype)
    assert code == 1
    assert verdict in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--compare", "--no-speculation"], "--compare"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--dtype", "int3"], "dtype"),
        (["--tree-size", "many"], "--tree-size"),
        (["--tree-size", "65"], "tree_size"),
        (["--tree", "oak"], "oak"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--heads", "/nowhere/heads.pt"], "/nowhere/heads.pt"),
        (["--max-model-len", "100000"], "max_model_len"),
        (["--max-model-len", "4", "--max-tokens", "1"], "4"),
    ],
)
def test_wrong_options_are_one_sentence(medusa, tiny, arguments, named):
    code, out, err = medusa("generate", "hello", *tiny, *arguments)
    assert (code, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith("medusa: ")
    assert named in sentence
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "hello", "--speed", "11"], ["generate", "hello", "--seed", "x"]])
def test_wrong_usage_exits_with_2(medusa, arguments):
    code, _, err = medusa(*arguments)
    assert code == 2
    assert "Usage" in err


def test_version(medusa):
    code, out, _ = medusa("--version")
    assert code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", out)


def on_the_demo_model(*arguments: str) -> str:
    """stdout of `medusa generate` with these arguments."""
    command = [sys.executable, "-c", "from medusa_core.cli.main import main; main()", "generate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.demo
def test_the_demo_model_answers():
    out = on_the_demo_model("What is the capital of France? Answer in one sentence.", "--max-tokens", "24")
    assert "Paris" in out
    assert "Qwen2.5-Coder-0.5B-Instruct" in out
    assert FIGURES.search(out)


@pytest.mark.long
@pytest.mark.demo
def test_the_demo_model_compares_in_sixteen_bits():
    out = on_the_demo_model(
        "def quicksort(items):", "--raw", "--compare", "--max-tokens", "24", "--dtype", "bfloat16", "--tree-size", "8"
    )
    assert re.search(r"\[compare: (all 24 tokens are equal|a near-tie)", out)


@pytest.mark.demo
@pytest.mark.long
@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.9", "--top-p", "0.9", "--seed", "7"]])
def test_the_demo_model_compares_in_float32(sampling):
    prompt = "Write a Python class for a bank account."
    out = on_the_demo_model(prompt, "--compare", "--max-tokens", "64", "--dtype", "float32", "--tree-size", "16", *sampling)
    assert "[compare: all 64 tokens are equal]" in out
