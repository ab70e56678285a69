"""Device-side figures: what a step costs, how far from the memory floor it is, and what arrivals do to those who decode."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from tqdm import tqdm

from medusa_core.bench.arrivals import ArrivalEffect, ArrivalPlan, measure_arrivals, why_no_arrivals
from medusa_core.bench.figures import Spread, spread, what_is_missing
from medusa_core.bench.kernel_table import KernelTable, profile_steps
from medusa_core.bench.memory_floor import StepBytes, copy_bandwidth, step_bytes
from medusa_core.bench.offline import drain, make_request
from medusa_core.bench.prompts import TokenPrompt, random_prompts
from medusa_core.config import EngineConfig
from medusa_core.engine.core import EngineCore
from medusa_core.params import SamplingParams
from medusa_core.runtime.step_profiler import StepProfiler

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, ignore_eos=True)
SAMPLED_NAME = "T=0.7, top-p 0.9"
_KERNEL_STEPS = 10
_TTFT_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """Sizes to measure. ttft_lens: prompt tokens."""

    lanes: tuple[int, ...] = (1, 8, 64, 256)
    context_len: int = 1024
    num_steps: int = 50
    ttft_lens: tuple[int, ...] = (128, 1024, 4096)
    # None: not measured
    arrivals: ArrivalPlan | None = field(default_factory=ArrivalPlan)


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """One kind of step. ratio: to the plain greedy step of as many lanes. floor_s: bytes / copy bandwidth; floor_share: of step_s.

    skipped: why it was not measured; then all figures are None.
    """

    num_lanes: int
    num_nodes: int
    context_len: int
    sampling: str
    step_s: float | None = None
    ratio: float | None = None
    draft_s: float | None = None
    step_bytes: int | None = None
    floor_s: float | None = None
    floor_share: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """Seconds from submission to the first token on an idle engine."""

    num_prompt_tokens: int
    ttft_s: Spread | None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class LatencyFigures:
    """bandwidth: measured copy, bytes read and written per second."""

    bandwidth: float
    bytes: StepBytes
    steps: list[StepPoint]
    kernels: list[KernelTable] = field(default_factory=list)
    first_tokens: list[FirstToken] = field(default_factory=list)
    arrivals: ArrivalEffect | None = None
    arrivals_skipped: str | None = None


@runtime_checkable
class TimesDrafts(Protocol):
    """A runner that can run its drafting alone."""

    def draft_seconds(self, num_lanes: int, num_nodes: int) -> float: ...


def build_profiler(core: EngineCore, config: EngineConfig) -> StepProfiler:
    """A profiler of an idle engine that was built from `config`."""
    draft_timer = core.runner.draft_seconds if isinstance(core.runner, TimesDrafts) else None
    return StepProfiler(
        core.runner,
        num_lanes=core.info.max_num_seqs,
        num_blocks=core.info.num_blocks,
        block_size=core.info.block_size,
        max_model_len=core.info.max_model_len,
        vocab_size=core.info.vocab_size,
        max_depth=core.info.max_depth,
        max_step_rows=config.scheduler.max_step_rows,
        max_step_tokens=config.scheduler.max_step_tokens,
        draft_timer=draft_timer,
    )


def run_latency(
    core: EngineCore, config: EngineConfig, plan: LatencyPlan, *, progress: bool
) -> Iterator[tuple[LatencyFigures, str | None]]:
    """Measure everything on an idle engine without a prefix cache. Takes minutes; leaves the engine idle.

    After each point: the figures so far, and what is missing of them (None with the last).
    """
    device = torch.device(core.info.device)
    sizes = core.info.tree_sizes
    profiler = build_profiler(core, config)
    bandwidth = copy_bandwidth(device)
    num_bytes = step_bytes(
        Path(core.info.tokenizer_path),
        getattr(torch, core.info.dtype),
        trust_remote_code=config.model.trust_remote_code,
    )
    num_steps = len(_step_kinds(plan, sizes))
    shapes = _kernel_shapes(profiler, plan, sizes)
    no_arrivals = why_no_arrivals(core, plan.arrivals) if plan.arrivals else "not asked for"
    figures = LatencyFigures(bandwidth=bandwidth, bytes=num_bytes, steps=[], arrivals_skipped=no_arrivals or "not reached")

    def so_far() -> tuple[LatencyFigures, str | None]:
        return figures, what_is_missing(
            ("steps", len(figures.steps), num_steps),
            ("kernel tables", len(figures.kernels), len(shapes)),
            ("first tokens", len(figures.first_tokens), len(plan.ttft_lens)),
            ("arrivals", int(figures.arrivals is not None), int(no_arrivals is None)),
        )

    for point in measure_steps(profiler, sizes, plan, num_bytes, bandwidth, progress=progress):
        figures = replace(figures, steps=[*figures.steps, point])
        yield so_far()
    for num_lanes, num_nodes in shapes:
        kernels = _measure_kernels(profiler, num_lanes, num_nodes, plan.context_len, device)
        figures = replace(figures, kernels=[*figures.kernels, kernels])
        yield so_far()
    for first_token in measure_first_tokens(core, plan, progress=progress):
        figures = replace(figures, first_tokens=[*figures.first_tokens, first_token])
        yield so_far()
    if plan.arrivals and no_arrivals is None:
        arrivals = measure_arrivals(core, plan.arrivals, progress=progress)
        figures = replace(figures, arrivals=arrivals, arrivals_skipped=None)
        yield so_far()


def _step_kinds(plan: LatencyPlan, sizes: Sequence[int]) -> list[tuple[str, SamplingParams, int, int]]:
    """Sampling and its name, lanes, nodes: greedy steps of every size, then sampled ones of 1 and of 16 nodes."""
    kinds = [("greedy", GREEDY, count, size) for count in plan.lanes for size in sizes]
    return kinds + [(SAMPLED_NAME, SAMPLED, count, size) for count in plan.lanes for size in sizes if size in (1, 16)]


def measure_steps(
    profiler: StepProfiler,
    sizes: Sequence[int],
    plan: LatencyPlan,
    num_bytes: StepBytes,
    bandwidth: float,
    *,
    progress: bool,
) -> Iterator[StepPoint]:
    """Each kind of step as it is measured."""
    plain_s: dict[int, float] = {}
    for sampling, params, count, size in tqdm(_step_kinds(plan, sizes), desc="steps", disable=not progress):
        skipped = profiler.why_not(count, size, plan.context_len, plan.num_steps)
        point = StepPoint(num_lanes=count, num_nodes=size, context_len=plan.context_len, sampling=sampling, skipped=skipped)
        if skipped is None:
            seconds = profiler.step_seconds(count, size, plan.context_len, params, plan.num_steps)
            plain_s.setdefault(count, seconds)  # sizes start with 1, and greedy comes first
            draft_s = profiler.draft_seconds(count, size) if params.is_greedy else None
            point = _with_figures(point, seconds, plain_s[count], draft_s, num_bytes, bandwidth)
        yield point


def _with_figures(
    point: StepPoint, step_s: float, plain_s: float, draft_s: float | None, num_bytes: StepBytes, bandwidth: float
) -> StepPoint:
    total = num_bytes.total(point.num_lanes, point.context_len)
    return StepPoint(
        num_lanes=point.num_lanes,
        num_nodes=point.num_nodes,
        context_len=point.context_len,
        sampling=point.sampling,
        step_s=step_s,
        ratio=step_s / plain_s,
        draft_s=draft_s,
        step_bytes=total,
        floor_s=total / bandwidth,
        floor_share=total / bandwidth / step_s,
    )


def _kernel_shapes(profiler: StepProfiler, plan: LatencyPlan, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Lanes and nodes whose kernels are shown: fewest and most lanes, plain and with 16 nodes where there is such a tree."""
    return [
        (count, size)
        for count, size in itertools.product(dict.fromkeys((plan.lanes[0], plan.lanes[-1])), (1, 16))
        if size in sizes and profiler.why_not(count, size, plan.context_len, _KERNEL_STEPS) is None
    ]


def _measure_kernels(profiler: StepProfiler, num_lanes: int, num_nodes: int, context_len: int, device: torch.device) -> KernelTable:
    with profiler.decoding(num_lanes, num_nodes, context_len, GREEDY, _KERNEL_STEPS) as run:
        return profile_steps(partial(run, _KERNEL_STEPS), _KERNEL_STEPS, device, num_lanes=num_lanes, num_nodes=num_nodes)


def measure_first_tokens(core: EngineCore, plan: LatencyPlan, *, progress: bool) -> Iterator[FirstToken]:
    """One request at a time on an idle engine; the first run of each length warms up and is not counted."""
    for length in tqdm(plan.ttft_lens, desc="first tokens", disable=not progress):
        if length + 1 > core.info.max_model_len:
            reason = f"exceeds max_model_len ({core.info.max_model_len})"
            yield FirstToken(num_prompt_tokens=length, ttft_s=None, skipped=reason)
            continue
        prompts = random_prompts(_TTFT_REPEATS + 1, length, core.info.vocab_size, seed=length)
        seconds = [_first_token_seconds(core, prompt) for prompt in prompts]
        yield FirstToken(num_prompt_tokens=length, ttft_s=spread(seconds[1:]))


def _first_token_seconds(core: EngineCore, prompt: TokenPrompt) -> float:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
    start_s = time.perf_counter()
    core.submit(make_request("first", prompt.token_ids, params, None))
    while not core.step():
        pass
    seconds = time.perf_counter() - start_s
    drain(core)
    return seconds
