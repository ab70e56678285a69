"""Engines put together from their options: what is found, what is refused, and that engines share nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medusa_core.config import (
    CacheConfig,
    DtypeName,
    EngineConfig,
    ExecutionConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from medusa_core.engine.build import build_engine
from medusa_core.engine.core import EngineCore
from medusa_core.engine.runners import is_captured
from medusa_core.errors import ConfigError, HeadsMismatchError, ModelLoadError
from medusa_core.model.loader import load_model
from medusa_core.model.packed_linear import can_pack
from medusa_core.outputs import FinishReason
from medusa_core.params import SamplingParams
from medusa_core.request import EngineRequest
from tests.engine.tiny_model import HIDDEN_SIZE, NUM_HEADS, heads_tensors, save_tiny_model
from tests.equivalence.driver import Output, make_engine, run
from tests.equivalence.models import oracle_heads, tiny_model

PROMPTS = [[5, 9, 33], [7, 80, 21, 4, 66]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    path = tmp_path / "heads.safetensors"
    save_file(heads_tensors(HIDDEN_SIZE), path)
    return path


def build(folder: Path, heads: Path | str | None = None, *, dtype: DtypeName = "float32", **speculation: object) -> EngineCore:
    """tree_size: 4 if heads are named, so that nothing is measured."""
    sizes = {} if heads in (None, "none") else {"tree_size": 4}
    config = EngineConfig(
        model=ModelConfig(model=str(folder), heads=None if heads is None else str(heads), dtype=dtype, device="cpu"),
        cache=CacheConfig(num_blocks=32),
        scheduler=SchedulerConfig(max_num_seqs=4),
        speculation=SpeculationConfig(**{**sizes, **speculation}),
    )
    return build_engine(config, progress=False)


def tokens_of(core: EngineCore) -> list[list[int]]:
    outputs = run(core, [(prompt, GREEDY) for prompt in PROMPTS])
    return [outputs[number, 0].token_ids for number in range(len(PROMPTS))]


def test_without_heads_it_serves_and_warns(folder, caplog):
    core = build(folder, prompt_lookup=False)
    assert (core.info.num_heads, core.info.tree, core.info.tree_size, core.info.max_depth) == (0, "none", "1", 0)
    assert "No Medusa heads found for tiny" in caplog.text
    assert [len(tokens) for tokens in tokens_of(core)] == [12, 12]


def test_without_heads_the_text_is_drafted_from(folder):
    core = build(folder, "none", tree_size=16)
    assert (core.info.num_heads, core.info.tree, core.info.tree_size, core.info.max_depth) == (0, "lookup", "16", 15)
    assert tokens_of(core) == tokens_of(build(folder, "none", enabled=False))


def test_heads_none_is_no_reason_to_warn(folder, caplog):
    assert build(folder, "none").info.num_heads == 0
    assert "No Medusa heads" not in caplog.text


def test_heads_by_name_change_no_token(folder, heads):
    core = build(folder, heads, prompt_lookup=False)
    assert (core.info.num_heads, core.info.tree, core.info.tree_size) == (NUM_HEADS, "mc_sim_7b_63", "4")
    assert core.info.max_depth == NUM_HEADS
    assert tokens_of(core) == tokens_of(build(folder, enabled=False))


def test_heads_beside_the_model_are_found(folder, heads):
    heads.rename(folder / "medusa_lm_head.safetensors")
    assert build(folder).info.num_heads == NUM_HEADS


def test_a_calibration_beside_the_heads_builds_the_tree(folder, heads):
    calibration = {"format": 1, "rank_accuracy": [[0.5, 0.2], [0.3, 0.1]], "num_tokens": 100, "source": "a test"}
    heads.with_suffix(".calibration.json").write_text(json.dumps(calibration))
    core = build(folder, heads)
    assert core.info.tree == "calibrated+lookup"


def test_without_speculation_heads_are_not_even_read(folder):
    core = build(folder, "/nowhere", enabled=False)
    assert core.info.num_heads == 0


def test_auto_measures_and_serves(folder, heads, caplog):
    with caplog.at_level(logging.INFO, logger="medusa_core.engine.runners"):
        core = build(folder, heads, tree_size="auto")
    assert core.info.tree_size == "auto"
    assert "Measured step cost by rows, ms: 1: " in caplog.text
    assert [len(tokens) for tokens in tokens_of(core)] == [12, 12]


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="this build of torch cannot pack weights")
def test_sixteen_bits_with_packed_layers(folder, heads):
    core = build(folder, heads, dtype="bfloat16")
    assert core.info.dtype == "bfloat16"
    assert [len(tokens) for tokens in tokens_of(core)] == [12, 12]


def test_heads_of_another_width_are_refused(folder, heads):
    save_file(heads_tensors(HIDDEN_SIZE + 8), heads)
    with pytest.raises(HeadsMismatchError, match=str(HIDDEN_SIZE + 8)):
        build(folder, heads)


def test_missing_heads_are_refused(folder):
    with pytest.raises(ModelLoadError, match=r"/nowhere/heads\.safetensors"):
        build(folder, "/nowhere/heads.safetensors")


def test_a_misspelt_tree_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="oak"):
        build(Path("/nowhere"), tree="oak")


def test_a_tree_too_deep_is_refused(folder, heads):
    with pytest.raises(ConfigError, match="needs 3 heads, the model has 2"):
        build(folder, heads, tree="chain-5")


def test_two_engines_in_one_process_do_not_notice_each_other():
    """Two models, two sizes of everything, their steps in turn."""

    def make(architecture: str, **options: object) -> EngineCore:
        loaded = tiny_model(architecture)
        sequences = [[*prompt, *range(20, 50)] for prompt in PROMPTS]
        return make_engine(loaded, oracle_heads(loaded, sequences), **options)

    makers = [
        lambda: make("llama", block_size=4, tree_size=16),
        lambda: make("gemma2", block_size=16, tree="chain-3", tree_size=4, max_steps_in_flight=1),
    ]
    params = [GREEDY, SamplingParams(temperature=1.0, seed=5, max_tokens=16, ignore_eos=True)]
    requests = list(zip(PROMPTS, params, strict=True))
    alone = [run(make_core(), requests) for make_core in makers]
    together = run_in_turn([make_core() for make_core in makers], requests)
    assert together == alone
    assert alone[0] != alone[1]


def run_in_turn(cores: list[EngineCore], requests: list[tuple[list[int], SamplingParams]]) -> list[dict[tuple[int, int], Output]]:
    outputs: list[dict[tuple[int, int], Output]] = [{} for _ in cores]
    for core in cores:
        for number, (prompt, params) in enumerate(requests):
            core.submit(EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params))
    while any(core.has_work for core in cores):
        for core, collected in zip(cores, outputs, strict=True):
            for delta in core.step() if core.has_work else ():
                output = collected.setdefault((int(delta.request_id), delta.choice_idx), Output())
                output.token_ids += delta.token_ids
                output.num_accepted += delta.num_accepted
                output.num_draft_steps += delta.num_draft_nodes > 0
                output.finish_reason = delta.finish_reason
    assert {output.finish_reason for collected in outputs for output in collected.values()} == {FinishReason.LENGTH}
    return outputs


def test_captured_steps_need_a_device_that_runs_kernels(monkeypatch):
    support = pytest.importorskip("medusa_core.kernels.support")
    config = EngineConfig(execution=ExecutionConfig(mode="captured"))
    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        is_captured(config, torch.device("cpu"))


def test_a_machine_that_cannot_compile_kernels_is_told_what_is_missing(monkeypatch):
    support = pytest.importorskip("medusa_core.kernels.support")

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(support, "run_a_kernel", fail)
    with pytest.raises(ConfigError, match=r"C compiler.*--enforce-eager"):
        is_captured(EngineConfig(), torch.device("cuda"))
    assert not is_captured(EngineConfig(execution=ExecutionConfig(mode="eager")), torch.device("cuda"))


def test_a_kernel_that_the_device_has_no_room_for_is_a_config_error(monkeypatch):
    support = pytest.importorskip("medusa_core.kernels.support")
    from medusa_core.runtime import kernel_check

    def fail(*_: object) -> None:
        raise support.KernelError("out of resource: shared memory")

    monkeypatch.setattr(kernel_check, "check_kernels", fail)
    with pytest.raises(ConfigError, match=r"shared memory.*--enforce-eager"):
        make_engine(tiny_model("llama"), None, mode="captured")


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_the_thread_of_an_engine_uses_the_device_of_the_engine(folder, monkeypatch, device, expected):
    chosen: list[torch.device] = []
    loaded = dataclasses.replace(load_model(ModelConfig(model=str(folder), device="cpu")), device=torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("medusa_core.engine.build.load_model", lambda *_, **__: loaded)
    monkeypatch.setattr("medusa_core.engine.build.assemble_engine", lambda *_, **__: None)
    build(folder, "none")
    assert chosen == expected
