"""`medusa calibrate`: what heads get right on texts the model writes, and the best tree for them, in a file beside the heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from medusa_core.bench.prompts import read_questions, render_questions
from medusa_core.cli.options import (
    DeviceOption,
    DtypeOption,
    EnforceEagerOption,
    HeadsOption,
    MaxModelLenOption,
    MaxTokensOption,
    ModelOption,
    NoPlotsOption,
    RevisionOption,
    TrustRemoteCodeOption,
    VerboseOption,
    model_config,
)
from medusa_core.cli.start import start_command
from medusa_core.config import NODE_BUCKETS, EngineConfig, ExecutionConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.build import build_engine
from medusa_core.errors import ConfigError
from medusa_core.model.calibration import Calibration, calibration_path, save_calibration
from medusa_core.model.checkpoint import find_heads, load_heads
from medusa_core.model.loader import load_model
from medusa_core.params import SamplingParams
from medusa_core.runtime.memory import release_memory
from medusa_core.text.processor import TextProcessor
from medusa_core.training.answers import Answer, answer_prompts
from medusa_core.training.measure import MeasuredAnswer, calibrate, tokens_per_step
from medusa_core.training.tree_plot import plot_tree
from medusa_core.tree.topology import TreeTopology


def calibrate_heads(
    prompts: Annotated[Path, typer.Option(help="JSON lines of Spec-Bench's format, which the heads were not trained on.")],
    num_prompts: Annotated[int | None, typer.Option(min=1, help="So many, evenly spread over the file.")] = None,
    max_tokens: MaxTokensOption = 256,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    output: Annotated[Path | None, typer.Option(help="File to write; beside the heads if not given.")] = None,
    no_plots: NoPlotsOption = False,
    model: ModelOption = None,
    heads: HeadsOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_model_len: MaxModelLenOption = None,
    enforce_eager: EnforceEagerOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure heads on the model's own greedy answers, and choose the tree that the server then offers."""
    progress = start_command(verbose=verbose, has_plots=not no_plots)
    if heads == "none":
        raise ConfigError("There is nothing to calibrate with --heads none.", hint="Name the heads.")
    if model is None and heads is None and output is None:
        raise ConfigError("The bundled heads are calibrated already.", hint="Name a file with --output to measure them again.")
    if output is not None and output.suffix == ".png":
        raise ConfigError(f"--output {output} is where the picture would go.", hint="Name a .json file.")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}.")
    config = model_config(model, heads, revision, dtype, device, max_model_len, trust_remote_code)
    questions = read_questions(prompts, num_prompts)
    engine_config = EngineConfig(
        model=config,
        scheduler=SchedulerConfig(max_num_seqs=min(max_num_seqs, len(questions))),
        execution=ExecutionConfig(mode="eager" if enforce_eager else "auto"),
    )

    core = build_engine(engine_config, progress=progress)
    if core.info.num_heads == 0:
        raise ConfigError(f"No heads found for {core.info.model_name}.", hint="Name them with --heads.")
    text = TextProcessor.load(core.info.tokenizer_path, trust_remote_code=trust_remote_code)
    rendered = [(prompt.category, prompt.token_ids) for prompt in render_questions(questions, text)]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    answers = answer_prompts(core, rendered, params, progress=progress)
    # The model's layers may have been replaced by fused or packed ones, and the cache takes most of the memory: load it anew.
    del core
    release_memory()

    what = f"{len(questions)} prompts of {prompts.name}, greedy answers of up to {max_tokens} tokens"
    calibration, measured, heads_path = _measure(config, answers, what, progress)
    _report(calibration, measured)
    path = output or calibration_path(heads_path)
    save_calibration(calibration, path)
    print(f"\nwritten: {path}")
    if not no_plots and calibration.tree is not None:
        picture = path.with_suffix(".png")
        plot_tree(calibration.tree, calibration.node_acceptance, f"{heads_path.name}: how often each node is accepted", picture)
        print(f"written: {picture}")


def _measure(
    config: ModelConfig, answers: Sequence[Answer], what: str, progress: bool
) -> tuple[Calibration, list[MeasuredAnswer], Path]:
    """What `calibrate` returns, and where the heads are."""
    loaded = load_model(config, progress=progress)
    heads_path = find_heads(config, loaded, progress=progress)
    assert heads_path is not None  # the engine had some
    heads = load_heads(heads_path, loaded)
    vocabulary = f"draft vocabulary of {heads.draft_vocab_size:,}" if heads.draft_vocab_size else "the whole vocabulary"
    dtype = str(loaded.dtype).removeprefix("torch.")
    source = f"{what} by {loaded.name} in {dtype}, {vocabulary}"
    calibration, measured = calibrate(heads, loaded, answers, source=source, progress=progress)
    return calibration, measured, heads_path


def _report(calibration: Calibration, measured: Sequence[MeasuredAnswer]) -> None:
    """Markdown tables: accuracy by head; tokens per step by nodes and category, with prompt lookup and without."""
    num_candidates = len(calibration.rank_accuracy[0])
    print(f"{calibration.num_tokens:,} positions: {calibration.source}\n")
    print(f"| head | top 1 | top 3 | top {num_candidates} |\n| --- | --- | --- | --- |")
    for number, shares in enumerate(calibration.rank_accuracy, start=1):
        print(f"| {number} | {shares[0]:.3f} | {sum(shares[:3]):.3f} | {sum(shares):.3f} |")
    for tree, what in ((calibration.lookup_tree, "with prompt lookup"), (calibration.tree, "of heads alone")):
        assert tree is not None
        _report_tree(tree, what, measured)


def _report_tree(tree: TreeTopology, what: str, measured: Sequence[MeasuredAnswer]) -> None:
    sizes = [size for size in NODE_BUCKETS if 1 < size <= tree.num_nodes]
    print(f"\nTokens per step {what}, by nodes of the tree (root included):\n")
    print(f"| category | tokens | {' | '.join(map(str, sizes))} |\n| --- | --- |{' --- |' * len(sizes)}")
    by_category = {answer.category: [other for other in measured if other.category == answer.category] for answer in measured}
    rows = {name: [tokens_per_step(tree.prefix(size), answers) for size in sizes] for name, answers in by_category.items()}
    for name, figures in rows.items():
        print(_row(name, sum(len(answer.paths) for answer in by_category[name]), figures))
    if len(rows) > 1:
        print(_row("mean of the categories", None, [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)]))
    num_tokens = sum(len(answer.paths) for answer in measured)
    print(_row("all steps", num_tokens, [tokens_per_step(tree.prefix(size), measured) for size in sizes]))


def _row(name: str, num_tokens: int | None, figures: Sequence[float]) -> str:
    return f"| {name} | {'' if num_tokens is None else f'{num_tokens:,}'} | {' | '.join(f'{figure:.2f}' for figure in figures)} |"
