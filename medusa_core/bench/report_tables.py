"""Figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medusa_core.bench.arrivals import ArrivalEffect
from medusa_core.bench.figures import Mismatch, RunFigures, Spread
from medusa_core.bench.kernel_table import KernelTable
from medusa_core.bench.latency import LatencyFigures, StepPoint
from medusa_core.bench.machine import Machine
from medusa_core.bench.server import ServedRun
from medusa_core.bench.throughput import ThroughputFigures
from medusa_core.outputs import EngineInfo

_NONE = "–"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def conditions(machine: Machine, engine: EngineInfo | None, command: str) -> str:
    """Where, when and with what."""
    gpu = f"{machine.gpu}, driver {machine.gpu_driver}, CUDA {machine.cuda}" if machine.gpu else "none"
    facts = [
        ("command", f"`{command}`"),
        ("date", machine.date),
        ("version", f"{machine.medusa_version}, commit {machine.commit or 'unknown'}"),
        ("GPU", gpu),
        ("CPU", f"{machine.cpu}, {machine.num_cpus} usable"),
        ("software", ", ".join([f"Python {machine.python}", *(f"{name} {v}" for name, v in machine.packages.items())])),
    ]
    if engine is not None:
        facts.append(("model", f"{engine.model_name}, {engine.dtype} on {engine.device}, up to {engine.max_model_len} tokens"))
        facts.append(("heads", f"{engine.num_heads}, tree {engine.tree}, size {engine.tree_size}, depth {engine.max_depth}"))
        facts.append(("cache", f"{engine.num_blocks} blocks of {engine.block_size} tokens, {engine.max_num_seqs} lanes"))
    return table(("", ""), facts)


def throughput(figures: ThroughputFigures) -> list[str]:
    sections = ["## Throughput", _runs(figures.runs)]
    if figures.ratios:
        rows = [
            (r.variant, str(r.concurrency), f"{r.ratio:.2f}x {r.baseline}", f"{r.ratio_range[0]:.2f} to {r.ratio_range[1]:.2f}")
            for r in figures.ratios
        ]
        sections += ["## Speed beside plain decoding", table(("variant", "at once", "tokens/s", "over repetitions"), rows)]
    sections += _latencies(figures.runs)
    sections += _steps(figures.runs)
    sections += _categories(figures.runs)
    if figures.mismatches:
        sections += ["## Tokens that differ", _MISMATCH_TEXT, _mismatches(figures.mismatches)]
    return sections + _errors(figures.runs)


_MISMATCH_TEXT = (
    "Prompts whose output is not, token for token, that of the reference run. In float32 every one is a defect. In 16 bits the "
    "products of another number of rows are rounded differently, so that near-ties fall either way: compare the rows of plain "
    "decoding at other loads."
)


def _mismatches(mismatches: Sequence[Mismatch]) -> str:
    rows = []
    for m in mismatches:
        firsts = m.first_differences
        rows.append(
            (
                f"{m.variant}, {m.concurrency} at once",
                f"{m.reference}, {m.reference_concurrency} at once",
                f"{len(firsts)} of {m.num_prompts} ({100 * m.rate:.1f} %)",
                str(firsts[0]) if firsts else _NONE,
                str(firsts[len(firsts) // 2]) if firsts else _NONE,
            )
        )
    return table(("run", "reference", "prompts that differ", "earliest at token", "median at token"), rows)


def latency(figures: LatencyFigures) -> list[str]:
    size = figures.bytes
    sections = [
        "## Steps",
        f"Copy bandwidth {figures.bandwidth / 1e12:.3f} TB/s (bytes read and written). A step reads {size.trunk / 1e6:,.1f} MB of "
        f"the trunk, {size.lm_head / 1e6:,.1f} MB of lm_head and {size.per_slot:,} bytes per token of context and lane; the floor "
        "is these bytes over the bandwidth. The ratio is to the plain greedy step of as many lanes.",
        _step_table(figures.steps),
    ]
    skipped = [f"- {p.num_lanes} lanes, {p.num_nodes} nodes, {p.sampling}: {p.skipped}" for p in figures.steps if p.skipped]
    if skipped:
        sections.append("Not measured:\n\n" + "\n".join(skipped))
    if figures.first_tokens:
        rows = [(f"{t.num_prompt_tokens:,}", *_spread_cells(t.ttft_s), t.skipped or "") for t in figures.first_tokens]
        sections += ["## First token", table(("prompt tokens", "p50, ms", "p95, ms", "p99, ms", ""), rows)]
    sections.append("## Decoding while prompts arrive")
    sections.append(_arrivals(figures.arrivals) if figures.arrivals else f"Not measured: {figures.arrivals_skipped}.")
    return sections + [part for kernels in figures.kernels for part in _kernels(kernels)]


def _step_table(points: Sequence[StepPoint]) -> str:
    rows = [
        (
            str(p.num_lanes),
            str(p.num_nodes),
            p.sampling,
            _ms(p.step_s),
            _NONE if p.ratio is None else f"{p.ratio:.2f}",
            _ms(p.draft_s),
            _NONE if p.step_bytes is None else f"{p.step_bytes / 1e6:,.0f}",
            _ms(p.floor_s),
            _NONE if p.floor_share is None else f"{100 * p.floor_share:.0f} %",
        )
        for p in points
        if p.skipped is None
    ]
    return table(("lanes", "nodes", "sampling", "step, ms", "ratio", "drafting, ms", "MB", "floor, ms", "share of floor"), rows)


def _arrivals(effect: ArrivalEffect) -> str:
    plan = effect.plan
    rows = [
        ("per delivery, alone", *_spread_cells(effect.alone_frame_s)),
        ("per delivery, with arrivals", *_spread_cells(effect.beside_frame_s)),
        ("per token, alone", *_spread_cells(effect.alone_token_s)),
        ("per token, with arrivals", *_spread_cells(effect.beside_token_s)),
    ]
    left_out = f" {effect.num_left_out} more were left out: too many were still open." if effect.num_left_out else ""
    text = (
        f"{plan.num_decoding} lanes decode while a prompt of {plan.arrival_len:,} tokens arrives every "
        f"{1e3 * plan.interval_s:g} ms ({effect.num_arrivals} in all).{left_out}"
    )
    return text + "\n\n" + table(("time between", "p50, ms", "p95, ms", "p99, ms"), rows)


def _kernels(kernels: KernelTable) -> list[str]:
    rows = [
        (f"`{k.name[:100]}`", f"{k.calls_per_step:.1f}", f"{k.us_per_step:.1f}", f"{100 * k.share:.1f} %") for k in kernels.kernels
    ]
    return [
        f"## Kernels of a step: {kernels.num_lanes} lanes, {kernels.num_nodes} nodes",
        f"{kernels.total_us_per_step:,.0f} us in {kernels.num_kernels_per_step:.0f} kernels per step, under the profiler.",
        table(("kernel", "calls per step", "us per step", "share"), rows),
    ]


def served(runs: Sequence[ServedRun], offline_variant: str | None) -> list[str]:
    figures = [run.figures for run in runs]
    rows = []
    for run in runs:
        server = run.server
        us, acceptance = server.frontend_us_per_frame, server.acceptance_length
        rows.append(
            (
                _load(run.figures),
                f"{run.figures.num_frames:,}",
                _NONE if us is None else f"{us:.0f}",
                _NONE if server.frontend_cpu_s is None else f"{server.frontend_cpu_s / run.figures.seconds:.2f}",
                _NONE if acceptance is None else f"{acceptance:.2f}",
                _NONE if run.offline_share is None else f"{100 * run.offline_share:.0f} % of {run.offline_tokens_per_s:,.0f}",
            )
        )
    headers = ("load", "frames", "front-end CPU, us per frame", "front-end cores", "acceptance length", "share of offline")
    sections = ["## Throughput", _runs(figures), *_latencies(figures), "## The server", table(headers, rows)]
    if offline_variant:
        sections.append(f"Offline figures are those of `{offline_variant}`, in tokens/s.")
    return sections + _categories(figures) + _errors(figures)


def _runs(runs: Sequence[RunFigures]) -> str:
    has_cost = any(run.cost_per_million is not None for run in runs)
    rows = []
    for r in runs:
        slowest, fastest = r.tokens_per_s_range
        rows.append(
            (
                r.variant,
                _load(r),
                f"{r.tokens_per_s:,.1f}",
                f"{slowest:,.1f} to {fastest:,.1f}" if r.num_repetitions > 1 else _NONE,
                f"{r.requests_per_s:.2f}",
                str(r.num_requests),
                str(r.num_errors),
                f"{r.num_output_tokens:,}",
                _NONE if r.output_tokens is None else f"{r.output_tokens.p50:.0f}",
                *([_NONE if r.cost_per_million is None else f"{r.cost_per_million:.4f}"] if has_cost else []),
            )
        )
    headers = ("variant", "load", "tokens/s", "range", "requests/s", "requests", "errors", "output tokens", "per request, median")
    return table((*headers, *(["price per million"] if has_cost else [])), rows)


def _latencies(runs: Sequence[RunFigures]) -> list[str]:
    rows = []
    for r in runs:
        for name, spread in (
            ("first token", r.ttft_s),
            ("between deliveries", r.itl_frame_s),
            ("between tokens", r.itl_token_s),
            ("per output token, by request", r.tpot_s),
        ):
            if spread is not None:
                rows.append((r.variant, _load(r), name, *_spread_cells(spread)))
    return ["## Latency", table(("variant", "load", "time", "p50, ms", "p95, ms", "p99, ms"), rows)] if rows else []


def _steps(runs: Sequence[RunFigures]) -> list[str]:
    rows = [
        (
            r.variant,
            _load(r),
            _NONE if r.acceptance_length is None else f"{r.acceptance_length:.3f}",
            _NONE if r.mean_nodes is None else f"{r.mean_nodes:.1f}",
            f"{r.num_draft_steps:,}",
            f"{r.num_plain_steps:,}",
            _NONE if r.num_engine_steps is None else f"{r.num_engine_steps:,}",
        )
        for r in runs
    ]
    text = (
        "Acceptance length: tokens emitted per step that offered a tree, bonus included; the first token belongs to no step. Steps "
        "are counted per lane, but for the engine's own in the last column."
    )
    headers = ("variant", "load", "acceptance length", "nodes per step", "tree steps", "plain steps", "engine steps")
    return ["## Steps", text, table(headers, rows)]


def _categories(runs: Sequence[RunFigures]) -> list[str]:
    """Of each variant at its lowest load; results.json has them all."""
    lowest: dict[str, RunFigures] = {}
    for run in runs:
        lowest.setdefault(run.variant, run)
    rows = [
        (
            category.category,
            run.variant,
            _load(run),
            str(category.num_requests),
            f"{category.num_output_tokens:,}",
            f"{category.tokens_per_s:,.1f}",
            _NONE if category.acceptance_length is None else f"{category.acceptance_length:.3f}",
        )
        for run in lowest.values()
        for category in run.categories
    ]
    headers = ("category", "variant", "load", "requests", "output tokens", "tokens/s of a request", "acceptance length")
    return ["## By category", table(headers, rows)] if rows else []


def _errors(runs: Sequence[RunFigures]) -> list[str]:
    rows = [(r.variant, _load(r), message, str(count)) for r in runs for message, count in r.errors.items()]
    return ["## Errors", table(("variant", "load", "error", "requests"), rows)] if rows else []


def _load(run: RunFigures) -> str:
    return f"{run.concurrency} at once" if run.concurrency is not None else f"{run.request_rate:g} requests/s"


def _spread_cells(spread: Spread | None) -> tuple[str, str, str]:
    if spread is None:
        return _NONE, _NONE, _NONE
    return _ms(spread.p50), _ms(spread.p95), _ms(spread.p99)


def _ms(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{1e3 * seconds:.3f}"
