"""A model writes conversations by itself: resumable, the same for the same seed, no question twice."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.build import build_engine
from medusa_core.errors import ConfigError
from medusa_core.text.processor import TextProcessor
from medusa_core.training import self_generation
from medusa_core.training.question_kinds import KINDS
from medusa_core.training.samples import load_answers
from medusa_core.training.self_generation import GenerationPlan, Opening, generate_conversations, read_conversations
from tests.engine.tiny_model import EOS_ID, save_tiny_model
from tests.training.test_samples import TEMPLATE

PLAN = GenerationPlan(num_tokens=300, round_size=28, max_question_tokens=40, max_answer_tokens=12, temperatures=(0.0, 1.0), seed=3)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """An engine whose model ends what it writes now and then, and has room for a question."""
    folder = save_tiny_model(tmp_path_factory.mktemp("magpie") / "tiny", max_position_embeddings=512)
    model = ModelConfig(model=str(folder), heads="none", dtype="float32", device="cpu")
    config = EngineConfig(model=model, cache=CacheConfig(num_blocks=600), scheduler=SchedulerConfig(max_num_seqs=16))
    return build_engine(config, progress=False)


@pytest.fixture
def text(core):
    return TextProcessor.load(core.info.tokenizer_path, chat_template=TEMPLATE)


def contents(folder):
    return [file.read_bytes() for file in rounds(folder)]


def rounds(folder):
    return sorted(folder.glob("round-*.jsonl"))


@pytest.fixture(scope="module")
def whole(core, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    text = TextProcessor.load(core.info.tokenizer_path, chat_template=TEMPLATE)
    assert generate_conversations(core, text, PLAN, folder)
    return folder


def test_there_are_answers_enough_of_several_kinds_and_no_question_twice(core, text, whole):
    answers = [answer for file in rounds(whole) for answer in load_answers(file)]
    assert sum(len(answer.output_token_ids) for answer in answers) >= PLAN.num_tokens
    questions = [text.decode(answer.prompt_token_ids) for answer in answers]
    assert len(set(questions)) == len(questions)
    assert all(question.startswith("<user>") and question.endswith("\n<assistant>") for question in questions)
    assert {answer.category for answer in answers} <= {kind.name for kind in KINDS}
    assert len({answer.category for answer in answers}) >= 4
    assert all(len(answer.output_token_ids) <= PLAN.max_answer_tokens for answer in answers)
    assert not any(EOS_ID in answer.prompt_token_ids for answer in answers)


def test_a_stopped_run_goes_on_to_the_same_conversations(core, text, whole, tmp_path):
    assert len(rounds(whole)) >= 2, "one round is not enough to stop in between"
    checks = itertools.count()
    assert not generate_conversations(core, text, PLAN, tmp_path, should_stop=lambda: next(checks) == 1)
    assert contents(tmp_path) == contents(whole)[:1]
    assert generate_conversations(core, text, PLAN, tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert generate_conversations(core, text, PLAN, tmp_path), "what is there is not made again"
    assert contents(tmp_path) == contents(whole)


def test_a_round_that_was_deleted_is_made_again(core, text, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    rounds(tmp_path)[0].unlink()
    assert read_conversations(tmp_path, PLAN.num_tokens) is None
    assert generate_conversations(core, text, PLAN, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_as_many_rounds_are_read_as_it_takes(whole):
    first = load_answers(rounds(whole)[0])
    num_first = sum(len(answer.output_token_ids) for answer in first)
    assert read_conversations(whole, 1) == read_conversations(whole, num_first) == first
    assert len(read_conversations(whole, num_first + 1)) > len(first)
    assert read_conversations(whole, 10**9) is None


def test_rounds_of_another_plan_are_not_mixed_with(core, text, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=r"written with other options \(see origin\.json\).*another --output"):
        generate_conversations(core, text, dataclasses.replace(PLAN, seed=4), tmp_path)
    assert generate_conversations(core, text, dataclasses.replace(PLAN, num_tokens=PLAN.num_tokens + 50), tmp_path)


def test_a_model_that_knows_no_system_message_writes_questions_too(core, tmp_path):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    text = TextProcessor.load(core.info.tokenizer_path, chat_template=strict)
    assert generate_conversations(core, text, dataclasses.replace(PLAN, num_tokens=1), tmp_path)


def test_another_seed_writes_something_else(core, text, whole, tmp_path):
    other = GenerationPlan(num_tokens=1, round_size=28, max_question_tokens=40, max_answer_tokens=12, seed=4)
    assert generate_conversations(core, text, other, tmp_path)
    assert contents(tmp_path)[0] != contents(whole)[0]


def test_a_model_that_writes_no_question_is_refused(core, text, tmp_path, monkeypatch):
    monkeypatch.setattr(self_generation, "_MIN_QUESTION_CHARACTERS", 10_000)
    with pytest.raises(ConfigError, match="wrote no question"):
        generate_conversations(core, text, PLAN, tmp_path)


def test_a_chat_format_that_hides_the_message_is_refused(core, tmp_path):
    text = TextProcessor.load(core.info.tokenizer_path, chat_template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ConfigError, match="does not show the user's message"):
        generate_conversations(core, text, PLAN, tmp_path)


def test_first_words_and_what_follows_them_stay_apart(tmp_path):
    """Sentencepiece tokenizers write a word's space in front of it, and drop it in front of a text."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581Write", "\u2581a", "\u2581story"]
    backend = Tokenizer(models.WordLevel({piece: token_id for token_id, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    text = TextProcessor.load(tmp_path, chat_template=TEMPLATE)
    first_ids = text.encode("Write a", add_special_tokens=False)
    assert Opening("chat", first_ids, first_ids).question(text, [pieces.index("\u2581story"), 2]) == "Write a story"
