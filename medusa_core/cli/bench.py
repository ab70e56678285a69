"""`medusa bench`: throughput, latency, server, and render. Each writes results.json, report.md and plots, and prints the report.

A command checks its options, makes its folder, and then does what takes long inside `kept_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_core.bench.arrivals import ArrivalPlan
from medusa_core.bench.figures import what_is_missing
from medusa_core.bench.http_stream import Address
from medusa_core.bench.latency import LatencyPlan, run_latency
from medusa_core.bench.plots import require_matplotlib
from medusa_core.bench.prompts import (
    Question,
    Synthetic,
    TokenPrompt,
    check_lengths,
    random_prompts,
    random_texts,
    render_questions,
)
from medusa_core.bench.records import RunRecord
from medusa_core.bench.report import ServerReport, prepare_folder, read_report, write_report
from medusa_core.bench.server import OfflineReference, ServerPlan, first_served_model, frontend_pids, run_server
from medusa_core.bench.throughput import (
    TRANSFORMERS,
    TRANSFORMERS_PROMPTS,
    TRANSFORMERS_TOKENS,
    ThroughputPlan,
    parse_variants,
    run_throughput,
    summarise_throughput,
)
from medusa_core.bench.transformers_baseline import run_transformers
from medusa_core.cli.bench_checks import (
    check_sampling,
    check_tree,
    check_variants,
    extra_fields,
    offline_reference,
    prompt_source,
)
from medusa_core.cli.bench_report import KeptReport, kept_report, settings
from medusa_core.cli.options import (
    BenchSeedOption,
    DeviceOption,
    DtypeOption,
    EnforceEagerOption,
    HeadsOption,
    MaxModelLenOption,
    MaxTokensOption,
    ModelOption,
    NoPlotsOption,
    NoPromptLookupOption,
    NumPromptsOption,
    OutputOption,
    PriceOption,
    PromptsOption,
    RepeatsOption,
    RevisionOption,
    SyntheticOption,
    TemperatureOption,
    TopPOption,
    TreeOption,
    TrustRemoteCodeOption,
    VerboseOption,
    model_config,
    number_list,
)
from medusa_core.cli.start import start_command
from medusa_core.config import CacheConfig, EngineConfig, ExecutionConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from medusa_core.engine.build import build_engine
from medusa_core.errors import ConfigError
from medusa_core.params import SamplingParams
from medusa_core.text.processor import TextProcessor

bench_app = typer.Typer(no_args_is_help=True, help="Measure this engine, or any OpenAI-compatible server.")

# A folder for each, so that one measurement does not replace another.
_OUTPUT = Path("medusa-bench")
_SCHEDULER = SchedulerConfig()
_DEFAULT_SYNTHETIC_PROMPTS = 64
# Lanes beside those asked for, for the prompts that arrive while others decode.
_MIN_LATENCY_LANES = 32

MaxStepTokensOption = Annotated[int, typer.Option("--max-step-tokens", help="Most prefill tokens in one step.")]
MaxStepRowsOption = Annotated[int, typer.Option("--max-step-rows", help="Most decode rows (lanes x nodes) in one step.")]
NumBlocksOption = Annotated[int | None, typer.Option("--num-blocks", help="Blocks of the KV cache; from free memory if not given.")]


@bench_app.command()
def throughput(
    context: typer.Context,
    prompts: PromptsOption = None,
    synthetic: SyntheticOption = None,
    num_prompts: NumPromptsOption = None,
    max_tokens: MaxTokensOption = 256,
    concurrency: Annotated[str, typer.Option(help="Requests at once, a list.")] = "1,8,64,256",
    variants: Annotated[str, typer.Option(help="Of plain, speculation, tree-N, transformers.")] = "plain,speculation",
    repeats: RepeatsOption = 2,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: BenchSeedOption = 0,
    price_per_gpu_hour: PriceOption = None,
    output: OutputOption = _OUTPUT / "throughput",
    no_plots: NoPlotsOption = False,
    model: ModelOption = None,
    heads: HeadsOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    tree: TreeOption = "auto",
    no_prompt_lookup: NoPromptLookupOption = False,
    max_model_len: MaxModelLenOption = None,
    max_step_tokens: MaxStepTokensOption = _SCHEDULER.max_step_tokens,
    max_step_rows: MaxStepRowsOption = _SCHEDULER.max_step_rows,
    num_blocks: NumBlocksOption = None,
    enforce_eager: EnforceEagerOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Tokens per second of the engine itself, in this process, plain and with speculation in turns."""
    progress = start_command(verbose=verbose, has_plots=not no_plots)
    questions, shape = prompt_source(context)
    loads, names = number_list("--concurrency", concurrency), parse_variants(variants)
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        max_tokens=shape.num_output if shape else max_tokens,
        ignore_eos=shape is not None,
    )
    check_sampling(temperature, top_p)
    check_variants(names, temperature, tree, heads, has_lookup=not no_prompt_lookup)
    check_tree(tree, heads)
    model_options = model_config(model, heads, revision, dtype, device, max_model_len, trust_remote_code)
    config = _engine_config(
        model_options, max(loads), max_step_tokens, max_step_rows, num_blocks, tree, not no_prompt_lookup, enforce_eager
    )
    make_prompts = partial(_token_prompts, questions, shape, num_prompts, seed, trust_remote_code)
    engine_names = tuple(name for name in names if name != TRANSFORMERS)
    plan = ThroughputPlan(variants=engine_names, concurrency=loads, repeats=repeats, params=params, seed=seed)
    num_runs = plan.num_runs + (TRANSFORMERS in names)
    prepare_folder(output)
    records: list[RunRecord] = []
    notes = _throughput_notes(len(questions) or num_prompts or _DEFAULT_SYNTHETIC_PROMPTS, loads, names)
    with kept_report(context, "throughput", notes) as kept:
        for record in _throughput_runs(kept, config, plan, make_prompts, TRANSFORMERS in names, progress):
            records.append(record)
            figures = summarise_throughput(records, price_per_gpu_hour=price_per_gpu_hour)
            kept.keep(figures, what_is_missing(("runs", len(records), num_runs)))


def _throughput_runs(
    kept: KeptReport,
    config: EngineConfig,
    plan: ThroughputPlan,
    make_prompts: Callable[[Path, int], list[TokenPrompt]],
    has_transformers: bool,
    progress: bool,
) -> Iterator[RunRecord]:
    """Each run as it ends. transformers comes first, while no engine takes its memory."""
    params = plan.params
    if has_transformers:
        yield run_transformers(
            config.model,
            make_prompts,
            num_prompts=TRANSFORMERS_PROMPTS,
            max_tokens=min(TRANSFORMERS_TOKENS, params.max_tokens or TRANSFORMERS_TOKENS),
            ignore_eos=params.ignore_eos,
            progress=progress,
        )
    core = build_engine(config, progress=progress)
    kept.engine = core.info
    prompts = make_prompts(Path(core.info.tokenizer_path), core.info.vocab_size)
    check_lengths(prompts, params.max_tokens or 1, core.info.max_model_len)
    yield from run_throughput(core, prompts, plan, progress=progress)


@bench_app.command()
def latency(
    context: typer.Context,
    lanes: Annotated[str, typer.Option(help="Lanes that decode at once, a list.")] = "1,8,64,256",
    context_len: Annotated[int, typer.Option(min=1, help="Known tokens of each lane.")] = 1024,
    num_steps: Annotated[int, typer.Option(min=3, help="Steps per figure; the median counts.")] = 50,
    prompt_lens: Annotated[str, typer.Option(help="Prompt tokens for the time to the first token, a list.")] = "128,1024,4096",
    no_arrivals: Annotated[
        bool, typer.Option("--no-arrivals", help="Skip decoding while prompts arrive, which takes a CPU half an hour.")
    ] = False,
    output: OutputOption = _OUTPUT / "latency",
    no_plots: NoPlotsOption = False,
    model: ModelOption = None,
    heads: HeadsOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    tree: TreeOption = "auto",
    no_prompt_lookup: NoPromptLookupOption = False,
    max_model_len: MaxModelLenOption = None,
    max_step_tokens: MaxStepTokensOption = _SCHEDULER.max_step_tokens,
    max_step_rows: MaxStepRowsOption = _SCHEDULER.max_step_rows,
    num_blocks: NumBlocksOption = None,
    enforce_eager: EnforceEagerOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What one step costs, beside the time that reading the weights takes; first tokens; decoding while prompts arrive."""
    progress = start_command(verbose=verbose, has_plots=not no_plots)
    plan = LatencyPlan(
        lanes=number_list("--lanes", lanes),
        context_len=context_len,
        num_steps=num_steps,
        ttft_lens=number_list("--prompt-lens", prompt_lens),
        arrivals=None if no_arrivals else ArrivalPlan(),
    )
    num_lanes = max(*plan.lanes, _MIN_LATENCY_LANES)
    check_tree(tree, heads)
    model_options = model_config(model, heads, revision, dtype, device, max_model_len, trust_remote_code)
    config = _engine_config(
        model_options, num_lanes, max_step_tokens, max_step_rows, num_blocks, tree, not no_prompt_lookup, enforce_eager
    )
    prepare_folder(output)
    notes = [
        "A step's time is the median between results with one step in flight; random tokens, each lane in blocks of its own.",
        "First tokens and arrivals: random prompts, greedy, no prefix cache, speculation as the engine chooses.",
    ]
    with kept_report(context, "latency", notes) as kept:
        core = build_engine(config, progress=progress)
        kept.engine = core.info
        for figures, missing in run_latency(core, config, plan, progress=progress):
            kept.keep(figures, missing)


@bench_app.command()
def server(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="Of the server, e.g. http://localhost:8000.")],
    prompts: PromptsOption = None,
    synthetic: SyntheticOption = None,
    num_prompts: NumPromptsOption = None,
    max_tokens: MaxTokensOption = 256,
    concurrency: Annotated[str | None, typer.Option(help="Closed loop: requests at once, a list. 1,8,64 if not given.")] = None,
    request_rate: Annotated[float | None, typer.Option(min=1e-3, help="Open loop instead: requests per second, Poisson.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Load processes.")] = 4,
    repeats: RepeatsOption = 1,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: BenchSeedOption = 0,
    price_per_gpu_hour: PriceOption = None,
    output: OutputOption = _OUTPUT / "server",
    no_plots: NoPlotsOption = False,
    api_key: Annotated[str | None, typer.Option(help="Sent as bearer token; never written anywhere.")] = None,
    served_model: Annotated[str | None, typer.Option(help="Name of the model; the server's first if not given.")] = None,
    server_pid: Annotated[int | None, typer.Option(help="Front end to measure; found by its port if local.")] = None,
    extra_body: Annotated[str, typer.Option(help="JSON object of further fields for every request.")] = "{}",
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer.")] = 600.0,
    offline: Annotated[Path | None, typer.Option(help="results.json of medusa bench throughput to compare with.")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Load on any OpenAI-compatible server, streaming chat completions from several processes."""
    progress = start_command(verbose=verbose, has_plots=not no_plots)
    if concurrency is not None and request_rate is not None:
        raise ConfigError("--concurrency is a closed loop and --request-rate an open one.", hint="Leave one of them out.")
    questions, shape = prompt_source(context)
    if shape is not None:
        questions = random_texts(num_prompts or _DEFAULT_SYNTHETIC_PROMPTS, shape.num_input, seed)
    check_sampling(temperature, top_p)
    loads = () if request_rate is not None else number_list("--concurrency", concurrency or "1,8,64")
    reference = offline_reference(offline, loads)
    address = Address.parse(url)
    extra = {"temperature": temperature, "top_p": top_p, **({"ignore_eos": True} if shape else {}), **extra_fields(extra_body)}
    plan = ServerPlan(
        address=address,
        model=served_model or first_served_model(address, api_key=api_key),
        max_tokens=shape.num_output if shape else max_tokens,
        concurrency=loads,
        request_rate=request_rate,
        extra=extra,
        api_key=api_key,
        num_processes=processes,
        repeats=repeats,
        seed=seed,
        timeout_s=request_timeout,
        price_per_gpu_hour=price_per_gpu_hour,
        server_pids=frontend_pids(address, server_pid),
    )
    prepare_folder(output)
    notes = _server_notes(plan, len(questions), shape) + _offline_notes(reference, settings(context))
    with kept_report(context, "server", notes) as kept:
        for number, runs in enumerate(run_server(plan, questions, offline=reference, progress=progress), start=1):
            figures = ServerReport(url=url, model=plan.model, runs=runs, offline_variant=reference.variant if reference else None)
            kept.keep(figures, what_is_missing(("runs", number, plan.num_runs)))


@bench_app.command()
def render(folder: Annotated[Path, typer.Argument(help="Output of an earlier benchmark.")]) -> None:
    """Write report and plots again from results.json, e.g. on another machine than the one that ran the benchmark."""
    report = read_report(folder)
    require_matplotlib()
    prepare_folder(folder)
    print(write_report(report, folder, has_plots=True))


def _token_prompts(
    questions: list[Question],
    shape: Synthetic | None,
    num_prompts: int | None,
    seed: int,
    trust_remote_code: bool,
    folder: Path,
    vocab_size: int,
) -> list[TokenPrompt]:
    if shape is not None:
        return random_prompts(num_prompts or _DEFAULT_SYNTHETIC_PROMPTS, shape.num_input, vocab_size, seed)
    return render_questions(questions, TextProcessor.load(folder, trust_remote_code=trust_remote_code))


def _engine_config(
    model: ModelConfig,
    num_lanes: int,
    max_step_tokens: int,
    max_step_rows: int,
    num_blocks: int | None,
    tree: str,
    prompt_lookup: bool,
    enforce_eager: bool,
) -> EngineConfig:
    """Without a prefix cache, so that every repetition pays for its prefill."""
    return EngineConfig(
        model=model,
        cache=CacheConfig(enable_prefix_cache=False, num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=num_lanes, max_step_tokens=max_step_tokens, max_step_rows=max_step_rows),
        speculation=SpeculationConfig(tree=tree, prompt_lookup=prompt_lookup),
        execution=ExecutionConfig(mode="eager" if enforce_eager else "auto"),
    )


def _throughput_notes(num_prompts: int, loads: tuple[int, ...], names: tuple[str, ...]) -> list[str]:
    notes = [
        "In process, without HTTP. Tokens/s includes prefill; the prefix cache is off, so every repetition pays for it.",
        "Variants take turns within each repetition; a warm-up at every load came before and is not counted.",
    ]
    notes += _few_prompts_notes(num_prompts, loads)
    if TRANSFORMERS in names:
        notes.append(
            f"transformers ran at most {TRANSFORMERS_PROMPTS} of the prompts and {TRANSFORMERS_TOKENS} tokens of each, with batch "
            "1, once, before the others; its equality is over these tokens."
        )
    return notes


def _server_notes(plan: ServerPlan, num_prompts: int, shape: Synthetic | None) -> list[str]:
    notes = [
        f"{plan.num_processes} load processes, but no more than requests at once; streaming chat completions; tokens as `usage` "
        "states them. A delivery is a frame with text and may hold several tokens. Failed requests are counted as errors and are "
        "in no other figure.",
        "A server with a prefix cache has seen the prompts before in all but the first run.",
    ]
    notes += _few_prompts_notes(num_prompts, plan.concurrency)
    if shape is not None:
        notes.append("Synthetic prompts are random words and answers ignore EOS; prompt tokens are about as many as asked for.")
    if not plan.server_pids:
        notes.append("The front end's CPU time is unknown: the server is not on this machine, or belongs to another user.")
    return notes


def _few_prompts_notes(num_prompts: int, loads: tuple[int, ...]) -> list[str]:
    if num_prompts >= max(loads, default=0):
        return []
    return [f"There are {num_prompts} prompts, so at most {num_prompts} requests were open at once."]


def _offline_notes(reference: OfflineReference | None, options: dict[str, Any]) -> list[str]:
    if reference is None:
        return []
    notes = []
    if reference.incomplete:
        notes.append(f"The offline run is incomplete: {reference.incomplete}.")
    if differences := reference.differences(options):
        notes.append(f"The offline run is not the same: {'; '.join(differences)}.")
    return notes
