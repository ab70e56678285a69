"""`medusa train`: heads for a model, from conversations that are given or that the model writes itself."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from transformers import AutoTokenizer

from medusa_core.cli.bench_checks import is_given
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
from medusa_core.cli.start import start_command
from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from medusa_core.engine.build import build_engine
from medusa_core.errors import ConfigError
from medusa_core.model.calibration import find_calibration
from medusa_core.model.loader import LoadedModel, load_model, use_fast_attention
from medusa_core.model.sequential_heads import HeadsShape
from medusa_core.runtime.memory import release_memory
from medusa_core.text.processor import TextProcessor
from medusa_core.training.answers import Answer
from medusa_core.training.export import export_heads
from medusa_core.training.log import TrainingLog
from medusa_core.training.losses import LossWeights
from medusa_core.training.packing import Row, check_packing, pack_samples
from medusa_core.training.plan import TrainingPlan
from medusa_core.training.samples import Sample, answer_sample, read_samples
from medusa_core.training.self_generation import (
    GenerationPlan,
    check_origin,
    generate_conversations,
    origin,
    read_conversations,
)
from medusa_core.training.trainer import Trainer
from medusa_core.training.tuned_base import JointPlan, TunedBase, raise_no_peft
from medusa_core.training.vocabulary import choose_draft_vocabulary

logger = logging.getLogger(__name__)

_SHAPE = HeadsShape()
_PLAN = TrainingPlan()
_LOSS = LossWeights()
_JOINT = JointPlan(epochs=1)
_HEADS_FILE = "medusa_lm_head.safetensors"
_MODEL_FOLDER = "model"
_CHECKPOINT_FILE = "checkpoint.pt"
_CONVERSATIONS = "conversations"
_DEFAULT_ROW_LEN = 2048
# Conversations that the model writes; in tokens of answers.
_DEFAULT_TOKENS = 8_000_000
# Questions of a round for each lane: long rounds keep the lanes busy, short ones can be stopped sooner.
_ROUND_PER_LANE = 4
# One row in so many is kept back, and so many at most.
_VALIDATION_SHARE, _MAX_VALIDATION_ROWS = 50, 32
_SAVE_EVERY_S = 120.0
# How often the heads are tried on the rows kept back during a whole run.
_NUM_VALIDATIONS = 10


class OutputLayer(StrEnum):
    """Choices of --output-layer."""

    SHARED = "shared"
    OWN = "own"
    LOW_RANK = "low-rank"


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the heads, the log, and all that is needed to go on.")],
    data: Annotated[list[Path] | None, typer.Option(help="JSON lines of messages or texts; may be given again.")] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="Without --data: tokens of answers the model writes.")] = _DEFAULT_TOKENS,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Without --data: conversations written at once.")] = 512,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long; the same command goes on.")] = None,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads, each for a token further ahead.")] = _SHAPE.num_heads,
    num_layers: Annotated[int, typer.Option(min=1, help="Blocks per head.")] = _SHAPE.num_layers,
    sequential: Annotated[
        bool, typer.Option("--sequential/--independent", help="Whether a head reads the tokens that those in front of it guess.")
    ] = _SHAPE.is_sequential,
    share_blocks: Annotated[
        bool | None, typer.Option("--share-blocks/--own-blocks", help="Whether sequential heads share their blocks, as by default.")
    ] = None,
    mlp_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Width of the blocks, by default the hidden size, or 4 times that if shared; 0 for those of the Medusa paper.",
        ),
    ] = None,
    output_layer: Annotated[OutputLayer, typer.Option(help="Whose output layer heads use.")] = OutputLayer.SHARED,
    markov: Annotated[bool, typer.Option("--markov", help="Correct the logits by the token in front.")] = False,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the correction of --markov and --output-layer low-rank.")] = _SHAPE.rank,
    int8: Annotated[bool, typer.Option("--int8", help="Write the weights in 8 bits.")] = False,
    draft_vocab_size: Annotated[int, typer.Option(min=16, help="Most frequent tokens that heads may guess.")] = 32_768,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = _PLAN.epochs,
    joint_epochs: Annotated[
        int, typer.Option(min=0, help="Passes after those in which the model learns too (Medusa-2); it is written to OUTPUT/model.")
    ] = 0,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Of the adapters that --joint-epochs train; 0 trains all layers of the model.")
    ] = _JOINT.lora_rank,
    base_learning_rate: Annotated[float, typer.Option(help="The highest of the model, in --joint-epochs.")] = _JOINT.learning_rate,
    heads_weight: Annotated[
        float, typer.Option(help="Weight of all heads' losses beside the model's own, in --joint-epochs.")
    ] = _JOINT.heads_weight,
    row_len: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens of a row of packed documents, longer ones are cut; 2048, or the model's limit."),
    ] = None,
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
    """Train heads for a model, which stays as it is unless --joint-epochs are asked for. Run the same command again to go on."""
    progress = start_command(verbose=verbose, has_plots=not no_plots)
    loss = LossWeights(cross_entropy=cross_entropy, distillation=distillation, total_variation=total_variation, decay=decay)
    shape = HeadsShape(
        num_heads=num_heads, num_layers=num_layers, is_sequential=sequential,
        shares_blocks=sequential if share_blocks is None else share_blocks, mlp_size=mlp_size, output=output_layer.value,
        has_markov_term=markov, rank=rank,
    )  # fmt: skip
    if is_given(context, "rank") and not shape.has_correction:
        raise ConfigError("--rank is that of a correction, and there is none.", hint="Add --markov or --output-layer low-rank.")
    joint = None
    if joint_epochs:
        joint = JointPlan(epochs=joint_epochs, lora_rank=lora_rank, learning_rate=base_learning_rate, heads_weight=heads_weight)
    elif unused := next((name for name in ("lora_rank", "base_learning_rate", "heads_weight") if is_given(context, name)), None):
        raise ConfigError(f"--{unused.replace('_', '-')} is about training the model as well.", hint="Add --joint-epochs.")
    plan = TrainingPlan(
        joint=joint, shape=shape, epochs=epochs, rows_per_update=rows_per_update,
        learning_rate=learning_rate, warmup_share=warmup_share, ema_decay=ema_decay, seed=seed, loss=loss,
    )  # fmt: skip
    config = model_config(model, "none", revision, dtype, device, max_model_len, trust_remote_code)
    _check_options(context, output, has_data=bool(data))
    if joint is not None:
        _check_joint(joint, config, output)
    generation = GenerationPlan(num_tokens=num_tokens, round_size=_ROUND_PER_LANE * max_num_seqs, seed=seed)
    with _stop_asked_for(max_minutes) as should_stop, _file_errors(output):
        conversations = None if data else _conversations(config, generation, output, max_num_seqs, should_stop, progress)
        if not data and conversations is None:
            print(f"stopped while conversations were written, which are in {output / _CONVERSATIONS}; the same command goes on")
            return
        loaded = load_model(config, progress=progress)
        use_fast_attention(loaded)
        if not data:
            check_origin(output / _CONVERSATIONS, origin(loaded.name, loaded.dtype, loaded.vocab_size, generation))
        check_packing(loaded)
        text = TextProcessor.load(loaded.folder, trust_remote_code=trust_remote_code)
        samples = _given(data or [], text) if conversations is None else map(answer_sample, conversations)
        rows, validation_rows = _rows(samples, _row_len(row_len, loaded))
        token_map_V = choose_draft_vocabulary(rows, loaded.vocab_size, draft_vocab_size)
        trainer = Trainer(loaded, rows, plan, token_map_V)
        is_finished, accuracies = _run(trainer, validation_rows, output, should_stop, progress)
        agreement = trainer.compare_base(validation_rows) if joint and validation_rows else None
        heads_dtype = torch.int8 if int8 else loaded.dtype
        if trainer.base is None:
            metadata = {"base_model": loaded.name, **({"base_sha256": loaded.source_sha256} if loaded.source_sha256 else {})}
            export_heads(trainer.trained, output / _HEADS_FILE, token_map_V=token_map_V, dtype=heads_dtype, metadata=metadata)
        elif is_finished:
            folder = output / _MODEL_FOLDER
            _save_model(trainer.base, loaded, folder, trust_remote_code)
            metadata = {"base_model": f"{loaded.name}, trained with these heads"}
            export_heads(trainer.trained, folder / _HEADS_FILE, token_map_V=token_map_V, dtype=heads_dtype, metadata=metadata)
        if not no_plots:
            TrainingLog.plot(output)
    _report(trainer, accuracies, agreement, output, model, is_finished)


@contextmanager
def _stop_asked_for(max_minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Whether to stop at the next good place: time is up, or Ctrl-C or SIGTERM came. A second signal does what it usually does."""
    end_s = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    stop = threading.Event()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: object) -> None:
        stop.set()
        restore()
        print("medusa: stopping at the next good place; once more to stop at once", file=sys.stderr)

    for number in handlers:
        signal.signal(number, on_signal)
    try:
        yield lambda: stop.is_set() or (end_s is not None and time.monotonic() >= end_s)
    finally:
        restore()


@contextmanager
def _file_errors(output: Path) -> Iterator[None]:
    """What the folder does not let us write is one sentence."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.filename or 'a file'} cannot be written: {error.strerror}.") from error


def _check_options(context: typer.Context, output: Path, *, has_data: bool) -> None:
    """Options that would change nothing, and heads that somebody else has left there."""
    for name in ("num_tokens", "max_num_seqs"):
        if has_data and is_given(context, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is about conversations that the model writes, and --data gives others.",
                hint="Leave one of them out.",
            )
    heads, checkpoint = output / _HEADS_FILE, output / _CHECKPOINT_FILE
    if heads.exists() and not checkpoint.exists():
        raise ConfigError(f"{heads} was not made here: there is no {checkpoint.name}.", hint="Name another --output.")


def _check_joint(joint: JointPlan, config: ModelConfig, output: Path) -> None:
    """What would otherwise be noticed hours later, or not at all: that adapters cannot be made, or that a model is written over."""
    folder = output / _MODEL_FOLDER
    if joint.lora_rank and importlib.util.find_spec("peft") is None:
        raise_no_peft()
    if folder.exists() and not (output / _CHECKPOINT_FILE).exists():
        raise ConfigError(f"{folder} was not made here: there is no {_CHECKPOINT_FILE}.", hint="Name another --output.")
    if config.model is not None and Path(config.model).expanduser().resolve() == folder.resolve():
        raise ConfigError(
            f"{folder} is where the trained model would be written over the one it is made from.", hint="Name another --output."
        )


def _row_len(row_len: int | None, loaded: LoadedModel) -> int:
    if row_len is not None and row_len > loaded.max_model_len:
        raise ConfigError(f"--row-len {row_len} exceeds the model's context of {loaded.max_model_len} tokens.", hint="Lower it.")
    return row_len or min(_DEFAULT_ROW_LEN, loaded.max_model_len)


def _conversations(
    config: ModelConfig, plan: GenerationPlan, output: Path, max_num_seqs: int, should_stop: Callable[[], bool], progress: bool
) -> list[Answer] | None:
    """What the model has written, if need be now; None if there is not enough yet. An engine built for it is gone afterwards."""
    folder = output / _CONVERSATIONS
    if (answers := read_conversations(folder, plan.num_tokens)) is not None:
        return answers
    if (checkpoint := output / _CHECKPOINT_FILE).exists():
        raise ConfigError(
            f"{checkpoint} was trained on fewer conversations than --num-tokens {plan.num_tokens} asks for.",
            hint="Use the number from before to go on, or another --output to start anew.",
        )
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
    generate_conversations(core, text, plan, folder, should_stop=should_stop, progress=progress)
    del core
    release_memory()
    return read_conversations(folder, plan.num_tokens)


def _given(files: Iterable[Path], text: TextProcessor) -> Iterable[Sample]:
    return itertools.chain.from_iterable(read_samples(file, text) for file in files)


def _rows(samples: Iterable[Sample], row_len: int) -> tuple[list[Row], list[Row]]:
    """Rows to learn from, and rows kept back; the latter from all over the data."""
    rows, num_cut = pack_samples(samples, row_len)
    if num_cut:
        logger.warning("%d tokens of documents longer than --row-len %d were cut off.", num_cut, row_len)
    num_kept_back = min(math.ceil(len(rows) / _VALIDATION_SHARE), _MAX_VALIDATION_ROWS) if len(rows) > 1 else 0
    kept_back = {(2 * number + 1) * len(rows) // (2 * num_kept_back) for number in range(num_kept_back)}
    return [row for i, row in enumerate(rows) if i not in kept_back], [rows[i] for i in sorted(kept_back)]


def _run(
    trainer: Trainer, validation_rows: Sequence[Row], output: Path, should_stop: Callable[[], bool], progress: bool
) -> tuple[bool, list[tuple[float, float]]]:
    """Train from the last checkpoint on, if there is one. Returns whether the end was reached, and the heads' accuracy."""
    checkpoint = output / _CHECKPOINT_FILE
    if checkpoint.exists():
        trainer.load(checkpoint)
    num_done_before = trainer.num_updates_done
    log = TrainingLog(output, num_done_before)
    saved_s = time.monotonic()
    validate_every = math.ceil(trainer.num_updates / _NUM_VALIDATIONS)
    bar = tqdm(total=trainer.num_updates, initial=trainer.num_updates_done, desc="training", unit="update", disable=not progress)
    with bar, log:
        for step in trainer.run(should_stop):
            log.write(step)
            bar.update()
            bar.set_postfix_str(f"loss {step.loss:.3f}")
            if validation_rows and step.update % validate_every == 0 and step.update < trainer.num_updates:
                log.write_accuracies(step.update, trainer.validate(validation_rows))
            if time.monotonic() - saved_s > _SAVE_EVERY_S:
                trainer.save(checkpoint)
                saved_s = time.monotonic()
        trainer.save(checkpoint)
        accuracies = trainer.validate(validation_rows) if validation_rows else []
        if trainer.num_updates_done > num_done_before:
            log.write_accuracies(trainer.num_updates_done, accuracies)
    return trainer.num_updates_done == trainer.num_updates, accuracies


def _save_model(base: TunedBase, loaded: LoadedModel, folder: Path, trust_remote_code: bool) -> None:
    """The trained model in a folder of its own, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder, local_files_only=True, trust_remote_code=trust_remote_code)
    base.save(folder)
    tokenizer.save_pretrained(folder)
    # measured of the heads that were there before
    if (calibration := find_calibration(folder)) is not None:
        calibration.unlink()


def _report(
    trainer: Trainer,
    accuracies: list[tuple[float, float]],
    agreement: float | None,
    output: Path,
    model: str | None,
    is_finished: bool,
) -> None:
    print(f"{trainer.num_updates_done} of {trainer.num_updates} updates\n")
    if accuracies:
        print("Accuracy on rows kept back:\n\n| head | top 1 | top 10 |\n| --- | --- | --- |")
        for number, (top1, top10) in enumerate(accuracies, start=1):
            print(f"| {number} | {top1:.3f} | {top10:.3f} |")
    else:
        print("With a single row of data none was kept back, so nothing is known of the heads' accuracy.")
    if agreement is not None:
        print(f"\nThe model says what it said before training for {100 * agreement:.1f} % of the tokens.")
    if trainer.base is not None and not is_finished:
        print("\nstopped before the end, where model and heads are written; the same command goes on")
        return
    if trainer.base is not None:
        print(f"\nwritten: {output / _MODEL_FOLDER}, the trained model with its heads")
        heads_option = f"--model {output / _MODEL_FOLDER}"
    else:
        print(f"\nwritten: {output / _HEADS_FILE}")
        heads_option = f"--heads {output}" if model is None else f"--model {model} --heads {output}"
        if not is_finished:
            print("stopped before the end; the same command goes on")
        if find_calibration(output):
            print("the calibration there is of other heads: measure these")
    print(f"next: medusa calibrate {heads_option} --prompts <prompts that were not learned from>")
