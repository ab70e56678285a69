"""Training data: which tokens of conversations and texts are learned, and answers that are kept as tokens."""

from __future__ import annotations

import json

import pytest

from medusa_core.errors import ConfigError
from medusa_core.text.processor import TextProcessor
from medusa_core.training.answers import Answer
from medusa_core.training.samples import answer_sample, load_answers, read_samples, save_answers
from tests.engine.tiny_model import save_tiny_model

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("samples") / "tiny")


@pytest.fixture
def text(folder):
    return TextProcessor.load(folder, chat_template=TEMPLATE)


def read(text, path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return list(read_samples(path, text))


def learned_text(text, sample):
    return text.decode([token for token, is_learned in zip(sample.token_ids, sample.learned, strict=True) if is_learned])


def test_of_a_conversation_the_assistants_words_are_learned(text, tmp_path):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second answer"},
        {"role": "user", "content": "not answered"},
    ]
    (sample,) = read(text, tmp_path / "data.jsonl", {"messages": messages})
    assert (
        text.decode(sample.token_ids)
        == "<system>be brief\n<user>one?\n<assistant>first answer\n<user>two?\n<assistant>second answer\n"
    )
    assert learned_text(text, sample) == "first answer\nsecond answer\n"


def test_of_a_text_everything_is_learned(text, tmp_path):
    samples = read(text, tmp_path / "data.jsonl", {"text": "all of it"}, "", {"text": "and this"})
    assert [learned_text(text, sample) for sample in samples] == ["all of it", "and this"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ({"prompt": "x"}, r'line 2: expected an object with "messages", or with a "text"'),
        ({"messages": ["x"]}, r'line 2: "messages" must be a list of objects'),
        ({"text": ""}, r'line 2: expected .* "text" that is not empty'),
        ({"messages": [{"role": "user", "content": "x"}]}, r"line 2: the conversation has no message of the assistant"),
        ({"messages": [{"role": "user", "content": None}]}, r'line 2: "messages" must be a list of objects'),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, r'line 2: "messages" must be a list of objects'),
    ],
)
def test_a_wrong_line_is_named(text, tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        read(text, tmp_path / "data.jsonl", {"text": "fine"}, line)


def test_a_file_that_is_not_there_is_named(text, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        list(read_samples(tmp_path / "nowhere.jsonl", text))


def test_a_template_that_rewrites_earlier_messages_is_refused(folder, tmp_path):
    rewriting = TextProcessor.load(folder, chat_template="{{ messages | length }}" + TEMPLATE)
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    with pytest.raises(ConfigError, match=r"changes earlier messages when message 2"):
        read(rewriting, tmp_path / "data.jsonl", {"messages": [question, answer]})


def test_answers_are_kept_as_tokens(tmp_path):
    path = tmp_path / "answers.jsonl"
    answers = [Answer(prompt_token_ids=[1, 2], output_token_ids=[3, n], category="any") for n in range(3)]
    save_answers(path, answers)
    assert load_answers(path) == answers
    assert list(tmp_path.iterdir()) == [path]
    sample = answer_sample(answers[1])
    assert (sample.token_ids, sample.learned) == ([1, 2, 3, 1], [False, False, True, True])


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError, match="line 1 is no answer"):
        load_answers(path)


def test_a_message_that_the_template_refuses_is_named(folder, tmp_path):
    picky = TextProcessor.load(folder, chat_template="{{ raise_exception('no thanks') }}")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(ConfigError, match=r"line 1: .*no thanks"):
        read(picky, tmp_path / "data.jsonl", {"messages": messages})


def test_a_byte_order_mark_is_no_part_of_the_data(text, tmp_path):
    (sample,) = read(text, tmp_path / "data.jsonl", "\ufeff" + json.dumps({"text": "fine"}))
    assert learned_text(text, sample) == "fine"
