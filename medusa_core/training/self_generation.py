"""Conversations that a model writes all by itself, questions included, for heads to learn from when there is no other data.

A chat model that is given nothing but the opening of a user's message goes on to write one (Magpie, arXiv:2406.08464). Topics and
first words, drawn from lists for each kind of task, see to variety. The questions are then asked, as a user would, and answered at
several temperatures: the heads learn what this very model says.

The work is cut into rounds with a file each, so that it can be stopped at any time: what is there is not made again, and a round
depends on the seed, its number and the questions before it alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from medusa_core.engine.core import EngineCore
from medusa_core.errors import ConfigError
from medusa_core.outputs import FinishReason
from medusa_core.params import SamplingParams
from medusa_core.text.processor import TextProcessor
from medusa_core.training.answers import Answer, run_prompts
from medusa_core.training.question_kinds import KINDS, Kind
from medusa_core.training.samples import load_answers, save_answers

_PLACE = "\u241e"  # stands for the user's message in a rendered conversation; no tokenizer merges it with its neighbours
_MIN_QUESTION_CHARACTERS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationPlan:
    """num_tokens: of answers, at least. round_size: questions asked for in a round; fewer are new and complete.

    temperatures: of the answers, in turns. max_question_tokens, max_answer_tokens: longer questions are thrown away, longer answers
    cut.
    """

    num_tokens: int
    round_size: int = 1024
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7, 1.0)
    max_question_tokens: int = 768
    max_answer_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.round_size, self.max_question_tokens, self.max_answer_tokens) < 1 or not self.temperatures:
            raise ConfigError("Numbers of tokens and questions must be positive, and there must be a temperature.")


def generate_conversations(
    core: EngineCore,
    text: TextProcessor,
    plan: GenerationPlan,
    folder: Path,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> bool:
    """Add rounds to `folder` until its answers have enough tokens, or until `should_stop` says so between two rounds.

    Returns whether there are enough. Raises ConfigError for a model whose chat format cannot be taken apart, or one that writes no
    questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    num_tokens = 0
    files = round_files(folder)
    for file in files:
        answers = load_answers(file)
        num_tokens += sum(len(answer.output_token_ids) for answer in answers)
        known.update(_normalised(text.decode(answer.prompt_token_ids)) for answer in answers)
    bar = tqdm(total=plan.num_tokens, initial=num_tokens, desc="writing", unit="token", unit_scale=True, disable=not progress)
    with bar:
        for number in range(len(files), 10**6):
            if num_tokens >= plan.num_tokens:
                return True
            if should_stop():
                return False
            answers = _round(core, text, plan, number, known)
            partial = folder / "round.partial"
            partial.unlink(missing_ok=True)
            save_answers(partial, answers)
            partial.replace(folder / f"round-{number:05d}.jsonl")
            num_new = sum(len(answer.output_token_ids) for answer in answers)
            num_tokens += num_new
            bar.update(num_new)
    raise AssertionError("unreachable")


def round_files(folder: Path) -> list[Path]:
    """In the order they were written."""
    return sorted(folder.glob("round-*.jsonl"))


def _round(core: EngineCore, text: TextProcessor, plan: GenerationPlan, number: int, known: set[str]) -> list[Answer]:
    """Questions, then their answers. Adds to `known`."""
    generator = random.Random(f"{plan.seed} {number}")
    openings = list(_openings(text, plan.round_size, generator))
    # A short context is shared: half of it for the question, the rest for the answer.
    max_len = core.info.max_model_len
    sampled = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=min(plan.max_question_tokens, max_len // 2))
    params = [dataclasses.replace(sampled, seed=generator.getrandbits(63)) for _ in openings]
    written = run_prompts(core, [opening.token_ids for opening in openings], params)
    prompts: list[tuple[str, list[int]]] = []
    for opening, (output_ids, finish_reason) in zip(openings, written, strict=True):
        question = (opening.first_words + text.decode(output_ids)).strip()
        if finish_reason is not FinishReason.STOP or len(question) < _MIN_QUESTION_CHARACTERS:
            continue
        token_ids = text.render_chat([{"role": "user", "content": question}])
        key = _normalised(text.decode(token_ids))
        if key in known or len(token_ids) >= max_len:
            continue
        known.add(key)
        prompts.append((opening.kind, token_ids))
    if not prompts:
        raise ConfigError(
            f"The model wrote no question that ends within {sampled.max_tokens} tokens.", hint="Give conversations with --data."
        )
    answer_params = [
        SamplingParams(
            temperature=plan.temperatures[index % len(plan.temperatures)],
            max_tokens=min(plan.max_answer_tokens, max_len - len(token_ids)),
            seed=generator.getrandbits(63),
        )
        for index, (_, token_ids) in enumerate(prompts)
    ]
    answered = run_prompts(core, [token_ids for _, token_ids in prompts], answer_params)
    return [
        Answer(prompt_token_ids=token_ids, output_token_ids=output_ids, category=kind)
        for (kind, token_ids), (output_ids, _) in zip(prompts, answered, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Opening:
    """token_ids: everything up to where the model goes on, the first words of the user's message included."""

    kind: str
    first_words: str
    token_ids: list[int]


def _openings(text: TextProcessor, count: int, generator: random.Random) -> Iterator[_Opening]:
    """One of each kind in turn."""
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        first_words = kind.first_words(generator)
        token_ids = _user_turn(text, kind, generator) + text.encode(first_words, add_special_tokens=False)
        yield _Opening(kind.name, first_words, token_ids)


def _user_turn(text: TextProcessor, kind: Kind, generator: random.Random) -> list[int]:
    """The chat format up to where the user's message begins."""
    messages = [{"role": "system", "content": kind.system(generator)}, {"role": "user", "content": _PLACE}]
    rendered = text.decode(text.render_chat(messages, add_generation_prompt=False), skip_special_tokens=False)
    before, place, _ = rendered.partition(_PLACE)
    if not place:
        raise ConfigError("The chat format does not show the user's message as it is.", hint="Give conversations with --data.")
    return text.encode(before, add_special_tokens=False)


def _normalised(question: str) -> str:
    """What makes two questions the same."""
    return " ".join(question.lower().split())
