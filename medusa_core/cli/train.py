"""`medusa train`: heads for a model, from conversations that are given or that the model writes itself."""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from medusa_core.bench.plots import require_matplotlib
from medusa_core.cli.options import (
    DeviceOption,
    DtypeOption,
    MaxModelLenOption,
    ModelOption,
    NoPlotsOption,
    RevisionOption,
    TrustRemoteCodeOption,
    VerboseOption,
    model_config,
)
from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from medusa_core.engine.build import build_engine
from medusa_core.errors import ConfigError
from medusa_core.model.loader import load_model
from medusa_core.text.processor import TextProcessor
from medusa_core.training.log import TrainingLog
from medusa_core.training.losses import LossWeights
from medusa_core.training.packing import Row, check_packing, pack_samples
from medusa_core.training.samples import Sample, answer_sample, load_answers, read_samples
from medusa_core.training.self_generation import GenerationPlan, generate_conversations, round_files
from medusa_core.training.trainable import export_heads
from medusa_core.training.trainer import Trainer, TrainingPlan
from medusa_core.training.vocabulary import choose_draft_vocabulary

logger = logging.getLogger(__name__)

_PLAN = TrainingPlan()
_LOSS = LossWeights()
_HEADS_FILE = "medusa_lm_head.safetensors"
_CHECKPOINT_FILE = "checkpoint.pt"
# Conversations that the model writes; in tokens of answers.
_DEFAULT_TOKENS = 8_000_000
# Questions of a round for each lane: long rounds keep the lanes busy, short ones can be stopped sooner.
_ROUND_PER_LANE = 4
# One row in so many is kept back, and so many at most.
_VALIDATION_SHARE, _MAX_VALIDATION_ROWS = 50, 32
_SAVE_EVERY_S = 120.0


def train(
    output: Annotated[Path, typer.Option(help="Folder for the heads, the log, and all that is needed to go on.")],
    data: Annotated[list[Path] | None, typer.Option(help="JSON lines of messages or texts; may be given again.")] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="Without --data: tokens of answers the model writes.")] = _DEFAULT_TOKENS,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Without --data: conversations written at once.")] = 256,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long; the same command goes on.")] = None,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads, each for a token further ahead.")] = _PLAN.num_heads,
    num_layers: Annotated[int, typer.Option(min=1, help="Residual blocks per head.")] = _PLAN.num_layers,
    draft_vocab_size: Annotated[int, typer.Option(min=16, help="Most frequent tokens that heads may guess.")] = 32_768,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = _PLAN.epochs,
    row_len: Annotated[int, typer.Option(min=8, help="Tokens of a row of packed documents; longer ones are cut.")] = 2048,
    rows_per_update: Annotated[int, typer.Option(min=1, help="Rows whose gradients make one update.")] = _PLAN.rows_per_update,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = _PLAN.learning_rate,
    warmup_share: Annotated[float, typer.Option(help="Share of the updates in which it rises.")] = _PLAN.warmup_share,
    ema_decay: Annotated[float, typer.Option(help="Moving average of the heads that is exported; 0 for none.")] = _PLAN.ema_decay,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the text's tokens in the loss.")] = _LOSS.cross_entropy,
    distillation: Annotated[float, typer.Option(help="Weight of the model's own distribution.")] = _LOSS.distillation,
    total_variation: Annotated[float, typer.Option(help="Weight of the distance of distributions.")] = _LOSS.total_variation,
    decay: Annotated[float, typer.Option(help="Weight of each head's loss against the one before.")] = _LOSS.decay,
    seed: Annotated[int, typer.Option(help="Of questions, answers and the order of the data.")] = 0,
    no_plots: NoPlotsOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_model_len: MaxModelLenOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train Medusa heads on a model that stays as it is. Run the same command again to go on where it was stopped."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    loss = LossWeights(cross_entropy=cross_entropy, distillation=distillation, total_variation=total_variation, decay=decay)
    plan = TrainingPlan(
        num_heads=num_heads, num_layers=num_layers, epochs=epochs, rows_per_update=rows_per_update,
        learning_rate=learning_rate, warmup_share=warmup_share, ema_decay=ema_decay, seed=seed, loss=loss,
    )  # fmt: skip
    if not no_plots:
        require_matplotlib()
    progress = sys.stderr.isatty()
    config = model_config(model, "none", revision, dtype, device, max_model_len, trust_remote_code)
    should_stop = _deadline(max_minutes)
    _make_folder(output)
    if not data:
        generation = GenerationPlan(num_tokens=num_tokens, round_size=_ROUND_PER_LANE * max_num_seqs, seed=seed)
        if not _generate(config, generation, output / "conversations", max_num_seqs, should_stop, progress):
            print(f"stopped while conversations were written, which are in {output / 'conversations'}; the same command goes on")
            return
    loaded = load_model(config, progress=progress)
    check_packing(loaded)
    text = TextProcessor.load(loaded.folder, trust_remote_code=trust_remote_code)
    samples = _given(data, text) if data else _generated(output / "conversations")
    rows, validation_rows = _rows(samples, row_len)
    token_map_V = choose_draft_vocabulary(rows, loaded.vocab_size, draft_vocab_size)
    trainer = Trainer(loaded, rows, plan, token_map_V)
    is_finished = _run(trainer, output, should_stop, progress)
    accuracies = trainer.validate(validation_rows)
    metadata = {"base_model": loaded.name, **({"base_sha256": loaded.source_sha256} if loaded.source_sha256 else {})}
    heads_path = output / _HEADS_FILE
    export_heads(trainer.trained, heads_path, token_map_V=token_map_V, dtype=loaded.dtype, metadata=metadata)
    _report(trainer, accuracies, heads_path, is_finished)
    if not no_plots:
        TrainingLog.plot(output)


def _deadline(max_minutes: float | None) -> Callable[[], bool]:
    end_s = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    return lambda: end_s is not None and time.monotonic() >= end_s


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be made: {error.strerror}.") from error


def _generate(
    config: ModelConfig, plan: GenerationPlan, folder: Path, max_num_seqs: int, should_stop: Callable[[], bool], progress: bool
) -> bool:
    """Whether all conversations are there. The engine is gone afterwards, and its memory free."""
    core = build_engine(
        EngineConfig(
            model=config,
            cache=CacheConfig(enable_prefix_cache=False),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
            speculation=SpeculationConfig(enabled=False),
        ),
        progress=progress,
    )
    text = TextProcessor.load(core.info.tokenizer_path, trust_remote_code=config.trust_remote_code)
    is_complete = generate_conversations(core, text, plan, folder, should_stop=should_stop, progress=progress)
    del core
    gc.collect()
    torch.cuda.empty_cache()
    return is_complete


def _given(files: Iterable[Path], text: TextProcessor) -> Iterable[Sample]:
    return itertools.chain.from_iterable(read_samples(file, text) for file in files)


def _generated(folder: Path) -> Iterable[Sample]:
    return (answer_sample(answer) for file in round_files(folder) for answer in load_answers(file))


def _rows(samples: Iterable[Sample], row_len: int) -> tuple[list[Row], list[Row]]:
    """Rows to learn from, and rows kept back; the latter from all over the data."""
    rows, num_cut = pack_samples(samples, row_len)
    if num_cut:
        logger.warning("%d tokens of documents longer than --row-len %d were cut off.", num_cut, row_len)
    kept_back = set(range(_VALIDATION_SHARE // 2, len(rows), _VALIDATION_SHARE)[:_MAX_VALIDATION_ROWS]) if len(rows) > 1 else set()
    if len(rows) > 1 and not kept_back:
        kept_back = {len(rows) - 1}
    return [row for i, row in enumerate(rows) if i not in kept_back], [rows[i] for i in sorted(kept_back)]


def _run(trainer: Trainer, output: Path, should_stop: Callable[[], bool], progress: bool) -> bool:
    """Train from the last checkpoint on, if there is one. Returns whether the end was reached."""
    checkpoint = output / _CHECKPOINT_FILE
    if checkpoint.exists():
        trainer.load(checkpoint)
    log = TrainingLog(output, trainer.num_updates_done)
    saved_s = time.monotonic()
    bar = tqdm(total=trainer.num_updates, initial=trainer.num_updates_done, desc="training", unit="update", disable=not progress)
    with bar, log:
        for step in trainer.run(should_stop):
            log.write(step)
            bar.update()
            bar.set_postfix_str(f"loss {step.loss:.3f}")
            if time.monotonic() - saved_s > _SAVE_EVERY_S:
                trainer.save(checkpoint)
                saved_s = time.monotonic()
    trainer.save(checkpoint)
    return trainer.num_updates_done == trainer.num_updates


def _report(trainer: Trainer, accuracies: list[tuple[float, float]], heads_path: Path, is_finished: bool) -> None:
    print(f"{trainer.num_updates_done} of {trainer.num_updates} updates; accuracy on rows kept back:\n")
    print("| head | top 1 | top 10 |\n| --- | --- | --- |")
    for number, (top1, top10) in enumerate(accuracies, start=1):
        print(f"| {number} | {top1:.3f} | {top10:.3f} |")
    print(f"\nwritten: {heads_path}")
    if not is_finished:
        print("stopped before the end; the same command goes on")
    print(f"next: medusa calibrate --heads {heads_path} --prompts <prompts that were not learned from>")
