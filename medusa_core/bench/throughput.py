"""Offline throughput: variants of one engine, interleaved, at several loads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tqdm import tqdm

from medusa_core.bench.figures import Mismatch, Ratio, RunFigures, compare_speed, compare_tokens, summarise
from medusa_core.bench.offline import run_closed_loop
from medusa_core.bench.prompts import TokenPrompt
from medusa_core.bench.records import RunRecord
from medusa_core.engine.core import EngineCore
from medusa_core.errors import ConfigError
from medusa_core.params import SamplingParams

PLAIN, SPECULATION, TRANSFORMERS = "plain", "speculation", "transformers"
# transformers decodes some 20 tokens a second on a fast GPU: enough to compare, not to wait for.
TRANSFORMERS_PROMPTS = 8
TRANSFORMERS_TOKENS = 64
_WARM_UP_TOKENS = 16

TreeSize = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ThroughputPlan:
    """What to run. variants: names as on the command line, without `transformers`."""

    variants: tuple[str, ...]
    concurrency: tuple[int, ...]
    repeats: int
    params: SamplingParams
    seed: int

    @property
    def num_runs(self) -> int:
        return self.repeats * len(self.concurrency) * len(self.variants)


@dataclass(frozen=True, kw_only=True)
class ThroughputFigures:
    runs: list[RunFigures]
    ratios: list[Ratio] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)


def parse_variants(text: str) -> tuple[str, ...]:
    """Names divided by commas. Raises ConfigError for one that is unknown or named twice."""
    variants = tuple(part.strip() for part in text.split(","))
    for variant in variants:
        if variant != TRANSFORMERS:
            tree_size(variant)
    if len(set(variants)) != len(variants):
        raise ConfigError(f"--variants names a variant twice: {text}.")
    return variants


def tree_size(variant: str) -> TreeSize:
    """The size that a variant sets. Raises ConfigError for an unknown name."""
    fixed: dict[str, TreeSize] = {PLAIN: 1, SPECULATION: "auto"}
    if variant in fixed:
        return fixed[variant]
    match = re.fullmatch(r"tree-(\d+)", variant)
    if match is None or int(match[1]) < 2:
        raise ConfigError(f"--variants must be of plain, speculation, tree-N and transformers, got {variant!r}.")
    return int(match[1])


def run_throughput(
    core: EngineCore, prompts: Sequence[TokenPrompt], plan: ThroughputPlan, *, progress: bool
) -> Iterator[RunRecord]:
    """Each run as it ends. Raises ConfigError, before the first, for a variant that the engine's tree does not have."""
    for variant in plan.variants:
        _set_variant(core, variant)
    _warm_up(core, prompts, plan, progress)
    with tqdm(total=plan.num_runs * len(prompts), unit="request", disable=not progress) as bar:
        for repetition in range(plan.repeats):
            for concurrency in plan.concurrency:
                # Whoever comes first meets another machine (clocks, temperature) than whoever comes last: take turns.
                turn = repetition % len(plan.variants)
                for variant in (*plan.variants[turn:], *plan.variants[:turn]):
                    bar.set_description(f"{variant}, {concurrency} at once, repetition {repetition + 1}/{plan.repeats}")
                    _set_variant(core, variant)
                    yield run_closed_loop(
                        core,
                        prompts,
                        plan.params,
                        variant=variant,
                        concurrency=concurrency,
                        repetition=repetition,
                        seed=plan.seed,
                        on_finished=bar.update,
                    )
    core.set_tree_size("auto")


def summarise_throughput(runs: Sequence[RunRecord], *, price_per_gpu_hour: float | None) -> ThroughputFigures:
    """Figures of each variant at each load, speeds beside plain decoding's, and tokens beside plain decoding one at a time."""
    groups = _by_variant_and_load(runs)
    figures = [summarise(group, price_per_gpu_hour=price_per_gpu_hour) for group in groups.values()]
    ratios = [
        compare_speed(group, groups[PLAIN, concurrency])
        for (variant, concurrency), group in groups.items()
        if variant not in (PLAIN, TRANSFORMERS) and (PLAIN, concurrency) in groups
    ]
    return ThroughputFigures(runs=figures, ratios=ratios, mismatches=_compare_outputs(groups))


def _set_variant(core: EngineCore, variant: str) -> None:
    if variant == SPECULATION and core.info.max_depth == 0:
        raise ConfigError("The variant speculation needs heads or prompt lookup.", hint="Use --heads, or --variants plain.")
    core.set_tree_size(tree_size(variant))


def _warm_up(core: EngineCore, prompts: Sequence[TokenPrompt], plan: ThroughputPlan, progress: bool) -> None:
    """A few tokens at every load with every variant: captures, compilations and caches of the first time are paid here."""
    params = _shortened(plan.params, _WARM_UP_TOKENS)
    loads = [(concurrency, variant) for concurrency in plan.concurrency for variant in plan.variants]
    for concurrency, variant in tqdm(loads, desc="warm-up", disable=not progress):
        _set_variant(core, variant)
        run_closed_loop(core, prompts[:concurrency], params, variant=variant, concurrency=concurrency, seed=plan.seed)


def _shortened(params: SamplingParams, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=min(max_tokens, params.max_tokens or max_tokens),
        ignore_eos=params.ignore_eos,
    )


def _by_variant_and_load(runs: Sequence[RunRecord]) -> dict[tuple[str, int | None], list[RunRecord]]:
    """Groups in order of first appearance in the first repetition, loads first."""
    groups: dict[tuple[str, int | None], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.concurrency), []).append(run)
    return groups


def _compare_outputs(groups: dict[tuple[str, int | None], list[RunRecord]]) -> list[Mismatch]:
    """First repetitions against plain decoding at the lowest load; transformers' prompts also against speculation."""
    loads = sorted(load for variant, load in groups if variant == PLAIN and load is not None)
    if not loads:
        return []
    reference = groups[PLAIN, loads[0]][0]
    mismatches = []
    for (variant, load), group in groups.items():
        if variant == TRANSFORMERS:
            others = [other[0] for (name, other_load), other in groups.items() if name != TRANSFORMERS and other_load == loads[0]]
            mismatches += [_compare_with_transformers(other, group[0]) for other in others]
        elif (variant, load) != (PLAIN, loads[0]):
            mismatches.append(compare_tokens(group[0], reference))
    return mismatches


def _compare_with_transformers(run: RunRecord, reference: RunRecord) -> Mismatch:
    """Both cut to what transformers was asked for: it stops earlier, unless EOS comes first."""
    return compare_tokens(run, reference, max_tokens=TRANSFORMERS_TOKENS)
