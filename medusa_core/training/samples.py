"""What heads learn from: token sequences, and which of their tokens are to be guessed.

Two kinds of JSON-lines files are read, told apart line by line::

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}   a conversation
    {"text": "..."}                                                                                     a text

In a conversation the assistant's words are to be guessed, in a text everything. What the model wrote itself is kept as token ids
(`save_answers`), since tokenising its text again need not give the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from medusa_core.errors import ConfigError, InvalidParameterError
from medusa_core.text.json_lines import read_json_lines
from medusa_core.text.processor import TextProcessor
from medusa_core.training.answers import Answer

_JSON = msgspec.json.Encoder()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """learned: of each token, whether heads learn to guess it; as long as token_ids."""

    token_ids: list[int]
    learned: list[bool]


def read_samples(path: Path, text: TextProcessor) -> Iterator[Sample]:
    """The conversations and texts of a file, one after the other. Raises ConfigError naming line and field."""
    for where, data in read_json_lines(path, str(path)):
        if isinstance(data, dict) and isinstance(data.get("messages"), list):
            yield _conversation(data["messages"], where, text)
        elif isinstance(data, dict) and isinstance(data.get("text"), str) and data["text"]:
            token_ids = text.encode(data["text"])
            yield Sample(token_ids=token_ids, learned=[True] * len(token_ids))
        else:
            raise ConfigError(f'{where}: expected an object with "messages", or with a "text" that is not empty.')


def answer_sample(answer: Answer) -> Sample:
    """The answer is to be guessed, its prompt is not."""
    num_prompt, num_output = len(answer.prompt_token_ids), len(answer.output_token_ids)
    return Sample(token_ids=answer.prompt_token_ids + answer.output_token_ids, learned=[False] * num_prompt + [True] * num_output)


def save_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write answers to a file, a line each. It is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(_JSON.encode(answer) + b"\n" for answer in answers))
    partial.replace(path)


def load_answers(path: Path) -> list[Answer]:
    """What `save_answers` has written. Raises ConfigError for anything else."""
    answers = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            answers.append(msgspec.json.decode(line, type=Answer))
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{path}, line {number} is no answer ({error}).", hint="Delete the file: it is made again."
            ) from error
    return answers


def _conversation(messages: list[Any], where: str, text: TextProcessor) -> Sample:
    """The tokens of the whole conversation; learned is what each assistant message adds to what came before it."""
    if not messages or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ConfigError(f'{where}: "messages" must be a list of objects with "role" and "content", both texts.')
    token_ids: list[int] = []
    learned: list[bool] = []
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        try:
            prompt_ids = text.render_chat(messages[: number - 1])
            whole_ids = text.render_chat(messages[:number], add_generation_prompt=False)
        except InvalidParameterError as error:
            raise ConfigError(f"{where}: {error}") from error
        if whole_ids[: len(prompt_ids)] != prompt_ids or whole_ids[: len(token_ids)] != token_ids:
            raise ConfigError(
                f"{where}: the chat template changes earlier messages when message {number} is added, so it is not known which "
                "tokens are the assistant's.",
                hint="Give conversations of one question and one answer.",
            )
        learned += [False] * (len(prompt_ids) - len(token_ids)) + [True] * (len(whole_ids) - len(prompt_ids))
        token_ids = whole_ids
    if not token_ids:
        raise ConfigError(f"{where}: the conversation has no message of the assistant, so there is nothing to learn.")
    return Sample(token_ids=token_ids, learned=learned)
