"""Questions from files: what is read, and what is refused with line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_core.bench.prompts import check_lengths, parse_synthetic, random_prompts, random_texts, read_questions, seeded
from medusa_core.errors import ConfigError
from medusa_core.params import SamplingParams


def line(question_id: object = 1, category: object = "qa", turns: object = ("first", "second"), **more: object) -> str:
    return json.dumps({"question_id": question_id, "category": category, "turns": turns, **more})


@pytest.fixture
def write(tmp_path: Path):
    def write_lines(*lines: str) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write_lines


def test_first_turns_are_read_and_other_fields_left_alone(write):
    path = write(line(7, "writing", ["é"]), "", line("x", reference=["r"]))
    questions = read_questions(path)
    assert [(q.question_id, q.category, q.text) for q in questions] == [("7", "writing", "é"), ("x", "qa", "first")]


def test_a_selection_is_spread_evenly(write):
    path = write(*(line(number) for number in range(10)))
    assert [q.question_id for q in read_questions(path, 4)] == ["0", "2", "5", "7"]
    assert len(read_questions(path, 10)) == 10


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        (json.dumps({"category": "qa", "turns": ["a"]}), '"question_id"'),
        (line(question_id=None), '"question_id"'),
        (line(category=3), '"category"'),
        (line(category=""), '"category"'),
        (line(turns=[]), '"turns"'),
        (line(turns="text"), '"turns"'),
        (line(turns=[1]), '"turns"'),
        (line(turns=[""]), '"turns"'),
    ],
)
def test_errors_name_line_and_field(write, bad, named):
    with pytest.raises(ConfigError, match="line 3") as error:
        read_questions(write(line(), line(), bad))
    assert named in str(error.value)


def test_files_without_questions_or_with_too_few(write, tmp_path):
    with pytest.raises(ConfigError, match="no questions"):
        read_questions(write(""))
    with pytest.raises(ConfigError, match="holds 1 questions"):
        read_questions(write(line()), 2)
    with pytest.raises(ConfigError, match="nowhere"):
        read_questions(tmp_path / "nowhere")


def test_synthetic_shapes():
    shape = parse_synthetic("128x256")
    assert (shape.num_input, shape.num_output) == (128, 256)
    for text in ("128", "0x5", "5x0", "ax3", "1x2x3", ""):
        with pytest.raises(ConfigError, match="--synthetic"):
            parse_synthetic(text)


def test_random_prompts_have_the_length_asked_for_and_follow_the_seed():
    prompts = random_prompts(3, 20, 50, seed=1)
    assert [len(prompt.token_ids) for prompt in prompts] == [20, 20, 20]
    assert all(0 <= token < 50 for prompt in prompts for token in prompt.token_ids)
    assert prompts == random_prompts(3, 20, 50, seed=1)
    assert prompts != random_prompts(3, 20, 50, seed=2)
    assert [len(question.text.split()) for question in random_texts(2, 9, seed=0)] == [9, 9]


def test_prompts_that_do_not_fit_are_refused_by_name():
    prompts = random_prompts(2, 20, 50, seed=1)
    check_lengths(prompts, 30, 50)
    with pytest.raises(ConfigError, match="synthetic 0 has 20 tokens"):
        check_lengths(prompts, 31, 50)


def test_seeds_are_each_prompts_own_and_greedy_has_none():
    assert seeded(SamplingParams(temperature=0.5), 10, 3) == 13
    assert seeded(SamplingParams(temperature=0.0), 10, 3) is None


def test_a_file_that_cannot_be_read_is_named_once(tmp_path):
    path = tmp_path / "questions.jsonl"
    with pytest.raises(ConfigError) as error:
        read_questions(path)
    assert str(error.value) == f"--prompts {path}: No such file or directory."
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8") as error:
        read_questions(path)
    assert str(error.value).count(str(path)) == 1
