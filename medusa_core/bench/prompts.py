"""Prompts of a benchmark: questions from a file in Spec-Bench's format, or random tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_core.errors import ConfigError
from medusa_core.params import SamplingParams
from medusa_core.text.json_lines import read_json_lines
from medusa_core.text.processor import TextProcessor

SYNTHETIC_CATEGORY = "synthetic"


@dataclass(frozen=True, slots=True)
class Question:
    """First turn of a line of the file."""

    question_id: str
    category: str
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt as the engine takes it. name: for messages."""

    name: str
    category: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Random prompts of `num_input` tokens, answered with exactly `num_output`."""

    num_input: int
    num_output: int


def read_questions(path: Path, num_questions: int | None = None) -> list[Question]:
    """Questions of a JSON-lines file: {"question_id", "category", "turns": [first, ...]}.

    num_questions: so many, evenly spread over the file, so that every category keeps its share. Raises ConfigError naming line and
    field.
    """
    questions = [_parse_question(data, where) for where, data in read_json_lines(path, f"--prompts {path}")]
    if not questions:
        raise ConfigError(f"--prompts {path} holds no questions.")
    if num_questions is None:
        return questions
    if num_questions > len(questions):
        raise ConfigError(f"--num-prompts is {num_questions}, but {path} holds {len(questions)} questions.")
    return [questions[number * len(questions) // num_questions] for number in range(num_questions)]


def _parse_question(data: Any, where: str) -> Question:
    if not isinstance(data, dict):
        raise ConfigError(f'{where}: expected an object with "question_id", "category" and "turns".')
    question_id, category, turns = (data.get(name) for name in ("question_id", "category", "turns"))
    if not isinstance(question_id, int | str):
        raise ConfigError(f'{where}: "question_id" must be a number or a string.')
    if not isinstance(category, str) or not category:
        raise ConfigError(f'{where}: "category" must be a string.')
    if not (isinstance(turns, list) and turns and isinstance(turns[0], str) and turns[0]):
        raise ConfigError(f'{where}: "turns" must be a list that starts with the text of the first turn.')
    return Question(str(question_id), category, turns[0])


def parse_synthetic(text: str) -> Synthetic:
    """ "128x256" is 128 tokens in, 256 out. Raises ConfigError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f'--synthetic must be two numbers of tokens, like "128x256", got {text!r}.')
    return Synthetic(int(match[1]), int(match[2]))


def render_questions(questions: Sequence[Question], text: TextProcessor) -> list[TokenPrompt]:
    """Each question as a conversation of one message, in the model's chat format."""
    return [
        TokenPrompt(f"question {q.question_id}", q.category, text.render_chat([{"role": "user", "content": q.text}]))
        for q in questions
    ]


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int) -> list[TokenPrompt]:
    """Tokens drawn uniformly: nothing repeats, so nothing is cached, and drafts are as bad as they get."""
    generator = random.Random(seed)
    return [
        TokenPrompt(f"synthetic {number}", SYNTHETIC_CATEGORY, [generator.randrange(vocab_size) for _ in range(num_tokens)])
        for number in range(num_prompts)
    ]


def random_texts(num_prompts: int, num_words: int, seed: int) -> list[Question]:
    """Random words for a server whose vocabulary is unknown; most tokenizers make one token of each, `usage` tells how many."""
    generator = random.Random(seed)
    words = _WORDS.split()
    return [
        Question(str(number), SYNTHETIC_CATEGORY, " ".join(generator.choice(words) for _ in range(num_words)))
        for number in range(num_prompts)
    ]


def check_lengths(prompts: Sequence[TokenPrompt], max_tokens: int, max_model_len: int) -> None:
    """Raises ConfigError for a prompt that does not fit, before an hour's run ends at it."""
    for prompt in prompts:
        if len(prompt.token_ids) + max_tokens > max_model_len:
            raise ConfigError(
                f"{prompt.name} has {len(prompt.token_ids)} tokens; with {max_tokens} of output it exceeds the context of "
                f"{max_model_len}.",
                hint="Lower --max-tokens, or raise --max-model-len.",
            )


def seeded(params: SamplingParams, seed: int, prompt_idx: int) -> int | None:
    """The seed of one prompt's request: the same in every variant, so that the outputs can be compared. None for greedy."""
    return None if params.is_greedy else seed + prompt_idx


_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place "
    "case week company system program question work government number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game line end"
)
