"""Conversations that a model writes all by itself, questions included, for heads to learn from when there is no other data.

A chat model that is given nothing but the opening of a user's message goes on to write one (Magpie, arXiv:2406.08464). Topics and
first words, drawn from lists for each kind of task, see to variety. The questions are then asked, as a user would, and answered at
several temperatures: the heads learn what this very model says.

The work is cut into rounds with a file each, so that it can be stopped at any time: what is there is not made again, and a round
depends on the plan, its number and the questions before it alone (in 16 bits, up to near-ties).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medusa_core.engine.core import EngineCore
from medusa_core.errors import ConfigError, InvalidParameterError
from medusa_core.outputs import FinishReason
from medusa_core.params import SamplingParams
from medusa_core.text.processor import TextProcessor
from medusa_core.training.answers import Answer, run_prompts
from medusa_core.training.question_kinds import KINDS, Kind
from medusa_core.training.samples import load_answers, save_answers

_PLACE = "\u241e"  # stands for the user's message in a rendered conversation; no tokenizer merges it with its neighbours
_MIN_QUESTION_CHARACTERS = 12
_ROUND_FILE = "round-{:05d}.jsonl"
_ORIGIN_FILE = "origin.json"


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

    Returns whether there are enough. Raises ConfigError for a folder that another model or plan has written to, a model whose chat
    format cannot be taken apart, or one that writes no questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_origin(folder, origin(core.info.model_name, core.info.dtype, core.info.vocab_size, plan))
    known: set[str] = set()
    num_tokens = number = 0
    with tqdm(total=plan.num_tokens, desc="writing", unit="token", unit_scale=True, disable=not progress) as bar:
        while num_tokens < plan.num_tokens:
            file = folder / _ROUND_FILE.format(number)
            if not file.exists():
                if should_stop():
                    return False
                save_answers(file, _round(core, text, plan, number, known))
            answers = load_answers(file)
            known.update(_normalised(text.decode(answer.prompt_token_ids)) for answer in answers)
            num_new = sum(len(answer.output_token_ids) for answer in answers)
            num_tokens += num_new
            number += 1
            bar.update(num_new)
    return True


def read_conversations(folder: Path, num_tokens: int) -> list[Answer] | None:
    """The answers of the first rounds, as many as it takes for `num_tokens` tokens; None if there are not enough yet."""
    answers: list[Answer] = []
    number = 0
    while num_tokens > 0:
        file = folder / _ROUND_FILE.format(number)
        if not file.exists():
            return None
        new = load_answers(file)
        answers += new
        num_tokens -= sum(len(answer.output_token_ids) for answer in new)
        number += 1
    return answers


def origin(model_name: str, dtype: object, vocab_size: int, plan: GenerationPlan) -> dict[str, Any]:
    """What all rounds of a folder have in common: the model and the plan, but for how many tokens there shall be."""
    parts = {"model": model_name, "dtype": str(dtype).removeprefix("torch."), "vocab_size": vocab_size, **asdict(plan)}
    del parts["num_tokens"]
    return parts


def check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Raises ConfigError for conversations of another origin; writes it down where there are none yet."""
    content = json.dumps(origin, indent=2) + "\n"
    file = folder / _ORIGIN_FILE
    if not file.exists():
        file.write_text(content)
    elif file.read_text() != content:
        raise ConfigError(
            f"{folder} holds conversations of another model, or that were written with other options (see {file.name}).",
            hint="Use the same model, --seed and --max-num-seqs to go on, or another --output to start anew.",
        )


def _round(core: EngineCore, text: TextProcessor, plan: GenerationPlan, number: int, known: set[str]) -> list[Answer]:
    """Questions, then their answers. Adds to `known`."""
    generator = random.Random(f"{plan.seed} {number}")
    openings = list(_openings(text, plan.round_size, generator))
    # A short context is shared: half of it for the question, the rest for the answer.
    max_len = core.info.max_model_len
    longest = max(len(opening.token_ids) for opening in openings)
    num_question_tokens = min(plan.max_question_tokens, max_len // 2, max_len - longest)
    if num_question_tokens < 1:
        raise ConfigError(
            f"A context of {max_len} tokens is too short for questions: their openings take up to {longest}.",
            hint="Give conversations with --data, or raise --max-model-len.",
        )
    sampled = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=num_question_tokens)
    params = [dataclasses.replace(sampled, seed=generator.getrandbits(63)) for _ in openings]
    written = run_prompts(core, [opening.token_ids for opening in openings], params)
    prompts: list[tuple[str, list[int]]] = []
    for opening, (output_ids, finish_reason) in zip(openings, written, strict=True):
        question = opening.question(text, output_ids)
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
class Opening:
    """first_ids: the first words of the user's message. token_ids: everything up to where the model goes on, these included."""

    kind: str
    first_ids: list[int]
    token_ids: list[int]

    def question(self, text: TextProcessor, output_ids: list[int]) -> str:
        """The whole message. Decoded together, as some tokenizers drop the space in front of what is decoded alone."""
        return text.decode(self.first_ids + output_ids).strip()


def _openings(text: TextProcessor, count: int, generator: random.Random) -> Iterator[Opening]:
    """One of each kind in turn."""
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        first_ids = text.encode(kind.first_words(generator), add_special_tokens=False)
        yield Opening(kind.name, first_ids, _user_turn(text, kind, generator) + first_ids)


def _user_turn(text: TextProcessor, kind: Kind, generator: random.Random) -> list[int]:
    """The chat format up to where the user's message begins."""
    system, user = {"role": "system", "content": kind.system(generator)}, {"role": "user", "content": _PLACE}
    try:
        token_ids = text.render_chat([system, user], add_generation_prompt=False)
    except InvalidParameterError:
        # Some models know no system message.
        token_ids = _render(text, [user])
    rendered = text.decode(token_ids, skip_special_tokens=False)
    before, place, _ = rendered.partition(_PLACE)
    if not place:
        raise ConfigError("The chat format does not show the user's message as it is.", hint="Give conversations with --data.")
    return text.encode(before, add_special_tokens=False)


def _render(text: TextProcessor, messages: list[dict[str, str]]) -> list[int]:
    try:
        return text.render_chat(messages, add_generation_prompt=False)
    except InvalidParameterError as error:
        raise ConfigError(
            f"Questions cannot be put into the model's chat format: {error}", hint="Give texts with --data."
        ) from error


def _normalised(question: str) -> str:
    """What makes two questions the same."""
    return " ".join(question.lower().split())
