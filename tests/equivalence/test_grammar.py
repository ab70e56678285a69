"""Output under a grammar is a text of it, and does not depend on speculation, tree, batch or preemption."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from medusa_core.grammar.compiler import GrammarCompiler, vocabulary
from medusa_core.model.loader import LoadedModel
from medusa_core.outputs import FinishReason
from medusa_core.params import Grammar, SamplingParams
from medusa_core.plan import DecodeGroup
from medusa_core.request import EngineRequest
from medusa_core.runtime.masked_step import BegunStep, MaskedSteps
from tests.equivalence.driver import Output, make_engine, run
from tests.equivalence.models import EOS_ID, MAX_MODEL_LEN, VOCAB_SIZE, oracle_heads, tiny_model
from tests.grammars import save_tiny_tokenizer, tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 200},
        "in": {"type": "array", "items": {"enum": ["cat", "dog", 12, True, None]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "in"],
    "additionalProperties": False,
    # a random model would write little but space
    "x-guidance": {"whitespace_pattern": " ?"},
}
REGEX = r"[a-c]{4,9}-(cat|dog|12){2,3}(:[0-9]{1,9})?"
CHOICES = ["cat", "catcat", "bird 12", "dog"]
GRAMMARS = {
    "schema": Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
    "regex": Grammar(kind="regex", text=REGEX),
    "choice": Grammar(kind="choice", text=json.dumps(CHOICES)),
    "cfg": Grammar(kind="cfg", text='start: "[" start "]" | "cat" ("," start)? | "{" /[ab]{3}/ "}"'),
}
PARAMETERS = {
    f"{name}, {drawn}": dataclasses.replace(params, grammar=grammar)
    for name, grammar in GRAMMARS.items()
    for drawn, params in {
        "greedy": SamplingParams(temperature=0.0, max_tokens=60),
        "sampled": SamplingParams(temperature=1.0, seed=4, max_tokens=60),
    }.items()
} | {
    "free, greedy": SamplingParams(temperature=0.0, max_tokens=30),
    "free, sampled": SamplingParams(temperature=0.9, top_p=0.9, seed=8, max_tokens=30),
    "n": SamplingParams(temperature=1.3, seed=5, max_tokens=40, n=3, grammar=GRAMMARS["regex"]),
    "filters": SamplingParams(temperature=0.8, top_k=3, top_p=0.7, seed=6, max_tokens=60, grammar=GRAMMARS["schema"]),
    "penalties": SamplingParams(
        temperature=0.9, seed=7, max_tokens=60, frequency_penalty=1.5, logit_bias=((9, 8.0),), grammar=GRAMMARS["schema"]
    ),
    "cut by length": SamplingParams(temperature=0.0, max_tokens=5, grammar=GRAMMARS["schema"]),
    "min_tokens": SamplingParams(temperature=0.0, max_tokens=60, min_tokens=9, grammar=GRAMMARS["regex"]),
    "speculation off for one": SamplingParams(
        temperature=0.0, max_tokens=60, is_speculation_enabled=False, grammar=GRAMMARS["schema"]
    ),
}
VARIANTS = {
    "tree of 16": {},
    "tree of 48, one step in flight": {"tree_size": 48, "max_steps_in_flight": 1},
    "heads alone, without prompt lookup": {"tree_size": 32, "prompt_lookup": False, "max_steps_in_flight": 1},
    "small chunks, no prefix cache": {"max_step_tokens": 5, "enable_prefix_cache": False},
    "one lane": {"max_num_seqs": 1},
    "preemption": {"num_blocks": 46, "block_size": 4, "max_model_len": 120, "tree_size": 8, "max_steps_in_flight": 1},
}
NAMES = list(PARAMETERS)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randint(4, VOCAB_SIZE, (7 + 2 * number,), generator=generator).tolist() for number in range(len(PARAMETERS))]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    folder: Path = save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return dataclasses.replace(tiny_model("qwen2"), folder=folder)


@pytest.fixture(scope="module")
def plain(model) -> dict[tuple[int, int], Output]:
    """Each request alone in an engine without speculation."""
    outputs: dict[tuple[int, int], Output] = {}
    for number, (prompt, params) in enumerate(zip(prompts(), PARAMETERS.values(), strict=True)):
        alone = run(make_engine(model, None, tree_size=1), [(prompt, params)])
        outputs |= {(number, choice): output for (_, choice), output in alone.items()}
    return outputs


def text_of(output: Output) -> str:
    token_ids = output.token_ids
    assert EOS_ID not in token_ids[:-1]
    return tiny_tokenizer().decode(token_ids[:-1] if token_ids[-1] == EOS_ID else token_ids)


def check_text(name: str, text: str) -> None:
    if name.startswith("schema") or name in ("filters", "penalties", "speculation off for one"):
        value = json.loads(text)
        assert list(value) == ["name", "age", "in"]
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 8
        assert value["age"] in range(201)
        assert 2 <= len(value["in"]) <= 4
        assert all(item in ("cat", "dog", 12, True, None) for item in value["in"])
    elif name.startswith("choice"):
        assert text in CHOICES
    elif name.startswith("cfg"):
        while text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        assert re.match(r"cat|\{[ab]{3}\}|\[", text), text
    elif not name.startswith(("free", "cut")):
        assert re.fullmatch(REGEX, text), text


def test_outputs_are_texts_of_their_grammars(plain):
    num_ended = 0
    for (number, _), output in plain.items():
        if NAMES[number] == "cut by length":
            assert (output.finish_reason, len(output.token_ids)) == (FinishReason.LENGTH, 5)
            assert text_of(output).startswith("{")
        elif output.finish_reason is FinishReason.STOP:
            check_text(NAMES[number], text_of(output))
            num_ended += not NAMES[number].startswith("free")
    assert num_ended >= 14


def test_min_tokens_holds_the_end_back(plain):
    number = NAMES.index("min_tokens")
    assert len(plain[number, 0].token_ids) > 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_tokens_with_speculation(variant, plain, model):
    options = dict(VARIANTS[variant])
    loaded = dataclasses.replace(model, max_model_len=options.pop("max_model_len", MAX_MODEL_LEN))
    heads = oracle_heads(loaded, [prompts()[number] + output.token_ids for (number, _), output in plain.items()])
    core = make_engine(loaded, heads, **options)
    outputs = run(core, list(zip(prompts(), PARAMETERS.values(), strict=True)), arrive_every=1)
    for (number, choice), expected in plain.items():
        actual = outputs[number, choice]
        assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, expected.finish_reason), NAMES[number]
    num_accepted = {name: sum(outputs[key].num_accepted for key in plain if NAMES[key[0]] == name) for name in NAMES}
    assert num_accepted["schema, greedy"] > 2
    assert num_accepted["schema, sampled"] > 2
    assert num_accepted["regex, greedy"] > 0
    assert num_accepted["speculation off for one"] == 0
    if variant == "preemption":
        assert core.stats().num_preemptions_total > 0


@pytest.mark.long
def test_kernels_give_the_same_tokens(plain, model, monkeypatch):
    """Where there is a GPU, captured when they are first needed: masks arrive in the middle of a step, whose forward pass lanes
    without a grammar share."""
    names = ["free, greedy", "regex, greedy", "schema, sampled", "free, sampled", "speculation off for one"]
    numbers = [NAMES.index(name) for name in names]
    # the first is there for long enough to meet the others, whenever their masks come
    lengths = [24, 6, 6, 6, 6]
    requests = [
        (prompts()[number], dataclasses.replace(PARAMETERS[NAMES[number]], max_tokens=length))
        for number, length in zip(numbers, lengths, strict=True)
    ]
    heads = oracle_heads(model, [prompts()[number] + plain[number, 0].token_ids for number in numbers])
    lanes = {"max_num_seqs": 3, "max_step_rows": 24, "tree_size": 8, "max_step_tokens": 64}
    core = make_engine(model, heads, mode="captured", **lanes, max_steps_in_flight=1)
    begin, num_beside = MaskedSteps.begin, []

    def count(steps: MaskedSteps, group: DecodeGroup, beside: DecodeGroup | None) -> BegunStep:
        num_beside.append(0 if beside is None else len(beside.lanes))
        return begin(steps, group, beside)

    monkeypatch.setattr(MaskedSteps, "begin", count)
    outputs = run(core, requests, arrive_every=1)
    for place, number in enumerate(numbers):
        assert outputs[place, 0].token_ids == plain[number, 0].token_ids[: lengths[place]], NAMES[number]
    assert [outputs[place, 0].num_accepted > 0 for place in range(len(names))] == [True, True, True, True, False]
    assert max(num_beside) > 0


@pytest.mark.long
def test_a_lane_that_waits_for_its_masks_may_be_given_away(plain, model):
    names = ["regex, greedy", "free, greedy", "schema, greedy"]
    numbers = [NAMES.index(name) for name in names]
    requests = [
        EngineRequest(
            request_id=name, prompt_token_ids=prompts()[number], params=dataclasses.replace(PARAMETERS[name], max_tokens=max_tokens)
        )
        for name, number, max_tokens in zip(names, numbers, (30, 5, 5), strict=True)
    ]
    lanes = {"max_num_seqs": 2, "max_step_rows": 8, "tree_size": 4, "max_step_tokens": 64}
    heads = oracle_heads(model, [prompts()[number] + plain[number, 0].token_ids for number in numbers])
    core = make_engine(model, heads, mode="captured", **lanes, max_steps_in_flight=1)
    tokens: dict[str, list[int]] = {name: [] for name in names}

    def step() -> None:
        for delta in core.step():
            tokens[delta.request_id] += delta.token_ids

    core.submit(requests[0])
    core.submit(requests[1])
    while len(tokens[names[0]]) < 2:
        step()
    while core.runner._waiting is None:
        step()
    core.abort(names[0])
    core.submit(requests[2])
    while core.has_work:
        step()
    for name, number in zip(names[1:], numbers[1:], strict=True):
        assert tokens[name] == plain[number, 0].token_ids[:5], name


@pytest.mark.parametrize("mode", ["eager", pytest.param("captured", marks=pytest.mark.long)])
def test_typical_acceptance_takes_no_draft_that_the_grammar_forbids(mode, plain, model):
    """The drafts are those of other texts, so many are forbidden where they stand."""
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=30, grammar=GRAMMARS["regex"], typical_acceptance=(1e-6, 1.0))
    requests = [(prompts()[number], dataclasses.replace(params, seed=number)) for number in range(2)]
    heads = oracle_heads(model, [prompts()[number] + plain[number, 0].token_ids for number in range(2)])
    core = make_engine(model, heads, mode=mode, max_num_seqs=2, max_step_rows=32, tree_size=16, max_step_tokens=64)
    outputs = run(core, requests)
    assert sum(output.num_accepted for output in outputs.values()) > 0
    compiler = GrammarCompiler(lambda: vocabulary(tiny_tokenizer(), VOCAB_SIZE, [EOS_ID]))
    for output in outputs.values():
        token_ids = [token_id for token_id in output.token_ids if token_id != EOS_ID]
        assert compiler.compile(GRAMMARS["regex"]).try_consume_tokens(token_ids) == len(token_ids)
        assert output.finish_reason is FinishReason.STOP
        check_text("regex", text_of(output))
