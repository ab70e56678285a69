"""Bytes, bandwidth, kernels, first tokens and arrivals: figures by hand, then everything once on a tiny model."""

from __future__ import annotations

import itertools

import pytest
import torch

from medusa_core.bench import memory_floor
from medusa_core.bench.arrivals import ArrivalPlan, measure_arrivals, why_no_arrivals
from medusa_core.bench.kernel_table import NUM_KERNELS, make_table, profile_steps
from medusa_core.bench.latency import LatencyPlan, measure_first_tokens, measure_steps
from medusa_core.bench.memory_floor import StepBytes, copy_bandwidth, count_step_bytes
from medusa_core.engine.core import EngineCore
from medusa_core.params import SamplingParams
from tests.equivalence.driver import make_engine
from tests.equivalence.models import tiny_model


@pytest.fixture
def core() -> EngineCore:
    return make_engine(tiny_model("llama"), None, enable_prefix_cache=False, max_num_seqs=8)


class FakeProfiler:
    """A step costs a millisecond per lane and a tenth of that per node; sampling doubles it. Three lanes do not fit."""

    def why_not(self, num_lanes: int, num_nodes: int, context_len: int, num_steps: int) -> str | None:
        return "too many" if num_lanes == 3 else None

    def step_seconds(self, num_lanes: int, num_nodes: int, context_len: int, params: SamplingParams, num_steps: int) -> float:
        return 1e-3 * num_lanes * (1 + 0.1 * (num_nodes - 1)) * (1 if params.is_greedy else 2)

    def draft_seconds(self, num_lanes: int, num_nodes: int) -> float | None:
        return 1e-4 if num_nodes > 1 else None


def test_ratios_and_shares_of_the_floor():
    size = StepBytes(trunk=600, lm_head=300, per_slot=1)
    plan = LatencyPlan(lanes=(2, 3), context_len=50, num_steps=5)
    points = list(measure_steps(FakeProfiler(), [1, 4, 16], plan, size, 1e6, progress=False))
    found = {(p.num_lanes, p.num_nodes, p.sampling): p for p in points}
    assert len(found) == len(points) == 2 * (3 + 2)
    tree = found[2, 16, "greedy"]
    assert tree.step_s == pytest.approx(2e-3 * 2.5)
    assert tree.ratio == pytest.approx(2.5)
    assert tree.draft_s == 1e-4
    assert tree.step_bytes == 600 + 300 + 2 * 50
    assert tree.floor_s == pytest.approx(1e-3)
    assert tree.floor_share == pytest.approx(1e-3 / 5e-3)
    sampled = found[2, 1, "T=0.7, top-p 0.9"]
    assert (sampled.ratio, sampled.draft_s) == (pytest.approx(2.0), None)
    assert found[3, 4, "greedy"].skipped == "too many"
    assert found[3, 4, "greedy"].step_s is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_bytes_are_those_of_the_parameters_read(family):
    model = tiny_model(family).model
    size = count_step_bytes(model, torch.bfloat16)
    names = dict(model.named_parameters(remove_duplicate=True))
    config = model.config
    total = sum(parameter.numel() for parameter in names.values())
    embeddings = config.vocab_size * config.hidden_size
    lm_head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert size.lm_head == 2 * lm_head
    assert size.trunk == 2 * (total - embeddings - (0 if is_tied else lm_head))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert size.per_slot == 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    assert size.total(3, 10) == size.trunk + size.lm_head + 30 * size.per_slot


def test_a_model_without_memory_counts_the_same():
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama").model
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert count_step_bytes(empty, torch.float32) == count_step_bytes(model, torch.float32)


def test_bandwidth_is_positive():
    assert copy_bandwidth(torch.device("cpu")) > 1e6


def test_the_copy_fits_beside_an_engine_that_left_little_memory(monkeypatch):
    sizes = []
    ones = torch.ones
    monkeypatch.setattr(memory_floor, "free_memory_bytes", lambda device: 4096)
    monkeypatch.setattr(torch, "ones", lambda size, **options: sizes.append(size) or ones(size, **options))
    copy_bandwidth(torch.device("cpu"))
    # source and target take half of it
    assert sizes == [1024]


def test_kernels_are_per_step_longest_first_and_cut():
    rows = [("small", 20, 10.0), ("large", 40, 70.0), ("none", 5, 0.0), *((f"k{n}", 1, 1.0) for n in range(20 + NUM_KERNELS))]
    table = make_table(rows, 10, num_lanes=1, num_nodes=4)
    total = 10.0 + 70.0 + 20 + NUM_KERNELS
    assert table.total_us_per_step == pytest.approx(total / 10)
    assert table.num_kernels_per_step == (20 + 40 + 20 + NUM_KERNELS) / 10
    first = table.kernels[0]
    assert (first.name, first.calls_per_step, first.us_per_step, first.share) == ("large", 4.0, 7.0, 70.0 / total)
    assert [kernel.name for kernel in table.kernels[:2]] == ["large", "small"]
    assert len(table.kernels) == NUM_KERNELS


def test_operators_are_profiled_on_a_cpu():
    left = torch.randn(64, 64)

    def run() -> None:
        for _ in range(4):
            left @ left

    table = profile_steps(run, 4, torch.device("cpu"), num_lanes=1, num_nodes=1)
    assert {kernel.name: kernel.calls_per_step for kernel in table.kernels}["aten::mm"] == 1.0


def test_first_tokens_of_lengths_that_fit(core):
    limit = core.info.max_model_len
    short, long = measure_first_tokens(core, LatencyPlan(ttft_lens=(5, limit)), progress=False)
    assert (short.num_prompt_tokens, short.ttft_s.count, short.skipped) == (5, 10, None)
    assert long.ttft_s is None
    assert str(limit) in long.skipped
    assert not core.has_work


def test_arrivals_come_by_the_clock_and_every_lane_finishes(core):
    ticks = itertools.count()
    plan = ArrivalPlan(num_decoding=3, decode_prompt_len=4, decode_len=40, arrival_len=20, interval_s=5.0)
    effect = measure_arrivals(core, plan, progress=False, clock=lambda: float(next(ticks)))
    assert effect.num_arrivals > 3
    assert effect.num_left_out == 0
    # one token per delivery without speculation, and no lane waits for another
    assert effect.alone_frame_s == effect.alone_token_s
    assert effect.alone_frame_s.count >= 3 * (40 - 3)
    assert effect.beside_frame_s.p50 >= effect.alone_frame_s.p50
    assert not core.has_work


def test_arrivals_beyond_what_an_engine_keeps_up_with_are_left_out(core):
    ticks = itertools.count()
    plan = ArrivalPlan(num_decoding=7, decode_prompt_len=4, decode_len=40, arrival_len=20, interval_s=0.01)
    effect = measure_arrivals(core, plan, progress=False, clock=lambda: float(next(ticks)))
    assert effect.num_arrivals >= 64
    assert effect.num_left_out > 0


def test_why_arrivals_are_not_measured(core):
    assert "lanes" in why_no_arrivals(core, ArrivalPlan(num_decoding=8))
    assert "max_model_len" in why_no_arrivals(core, ArrivalPlan(num_decoding=4, arrival_len=10_000))
    assert why_no_arrivals(core, ArrivalPlan(num_decoding=4, arrival_len=20, decode_prompt_len=4, decode_len=4)) is None
