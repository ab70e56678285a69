"""Prompt lookup, with heads and without, changes no token, and saves steps where the text repeats itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from medusa_core.params import SamplingParams
from tests.equivalence.driver import Output, make_engine, run
from tests.equivalence.models import VOCAB_SIZE, oracle_heads, tiny_model

ARCHITECTURE = "llama"
# Tokens come again where a penalty is negative, or few tokens are likely.
PARAMETERS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "greedy, repeating": SamplingParams(temperature=0.0, max_tokens=40, frequency_penalty=-1.0, ignore_eos=True),
    "greedy, penalised": SamplingParams(temperature=0.0, max_tokens=40, repetition_penalty=1.3, presence_penalty=0.4),
    "sampled": SamplingParams(temperature=0.8, seed=1, max_tokens=40, top_k=3, ignore_eos=True),
    "sampled, repeating": SamplingParams(temperature=0.7, seed=2, max_tokens=40, presence_penalty=-2.0, top_p=0.9, ignore_eos=True),
    "biased": SamplingParams(temperature=1.0, seed=3, max_tokens=40, logit_bias=((7, 9.0), (9, 9.0)), ignore_eos=True),
    "stop ids": SamplingParams(temperature=1.0, seed=4, max_tokens=40, min_tokens=10, stop_token_ids=tuple(range(30))),
    "off": SamplingParams(temperature=0.0, max_tokens=20, is_speculation_enabled=False),
}
VARIANTS = {
    "chain": {"tree_size": 16},
    "short chain, one step in flight": {"tree_size": 4, "max_steps_in_flight": 1},
    "preemption": {"tree_size": 16, "num_blocks": 24, "max_model_len": 120, "max_steps_in_flight": 1},
}
CAPTURED = {"mode": "captured", "max_num_seqs": 2, "max_step_rows": 16, "tree_size": 8, "max_step_tokens": 64}


def prompts() -> list[list[int]]:
    """Each says the same twice."""
    generator = torch.Generator().manual_seed(21)
    words = [torch.randint(4, VOCAB_SIZE, (9 + number,), generator=generator).tolist() for number in range(len(PARAMETERS))]
    return [[*text, 5, *text] for text in words]


def requests(names: list[str]) -> list[tuple[list[int], SamplingParams]]:
    return [(prompt, params) for prompt, (name, params) in zip(prompts(), PARAMETERS.items(), strict=True) if name in names]


@pytest.fixture(scope="module")
def plain() -> dict[str, Output]:
    outputs = run(make_engine(tiny_model(ARCHITECTURE), None, tree_size=1), requests(list(PARAMETERS)))
    return {name: outputs[number, 0] for number, name in enumerate(PARAMETERS)}


def check(plain: dict[str, Output], outputs: dict[tuple[int, int], Output], names: list[str]) -> dict[str, Output]:
    by_name = {name: outputs[number, 0] for number, name in enumerate(names)}
    for name, output in by_name.items():
        assert (output.token_ids, output.finish_reason) == (plain[name].token_ids, plain[name].finish_reason), name
    return by_name


@pytest.mark.parametrize("has_heads", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_tokens_in_fewer_steps(variant, has_heads, plain):
    options, names = dict(VARIANTS[variant]), list(PARAMETERS)
    loaded = dataclasses.replace(tiny_model(ARCHITECTURE), max_model_len=options.pop("max_model_len", 256))
    heads = (
        oracle_heads(loaded, [prompt + plain[n].token_ids for n, prompt in zip(names, prompts(), strict=True)])
        if has_heads
        else None
    )
    core = make_engine(loaded, heads, prompt_lookup=True, **options)
    by_name = check(plain, run(core, requests(names), arrive_every=1), names)
    assert by_name["off"].num_draft_steps == 0
    assert min(by_name[name].num_accepted for name in ("greedy, repeating", "biased")) >= 10
    stats = core.stats()
    assert (stats.num_preemptions_total > 0) == (variant == "preemption")
    num_accepted = sum(output.num_accepted for output in by_name.values())
    assert sum(stats.num_head_hits_total) + stats.num_lookup_hits_total == num_accepted
    assert (sum(stats.num_head_hits_total) > 0) == has_heads


@pytest.mark.long
@pytest.mark.parametrize("has_heads", [False, True])
def test_the_same_tokens_on_kernels(has_heads, plain):
    loaded, names, num_tokens = tiny_model(ARCHITECTURE), ["greedy, repeating", "biased"], 14
    texts = [prompt + plain[name].token_ids for name, (prompt, _) in zip(names, requests(names), strict=True)]
    core = make_engine(loaded, oracle_heads(loaded, texts) if has_heads else None, prompt_lookup=True, **CAPTURED)
    short = [(prompt, dataclasses.replace(params, max_tokens=num_tokens)) for prompt, params in requests(names)]
    outputs = run(core, short)
    for number, name in enumerate(names):
        assert outputs[number, 0].token_ids == plain[name].token_ids[:num_tokens]
        assert outputs[number, 0].num_accepted > 0
    # the twin says the same of where they came from
    twin = make_engine(
        loaded, oracle_heads(loaded, texts) if has_heads else None, prompt_lookup=True, **CAPTURED | {"mode": "eager"}
    )
    run(twin, short)
    stats, expected = core.stats(), twin.stats()
    assert stats.num_head_hits_total == expected.num_head_hits_total
    assert stats.num_lookup_hits_total == expected.num_lookup_hits_total
    assert sum(stats.num_head_hits_total) + stats.num_lookup_hits_total == sum(output.num_accepted for output in outputs.values())


def predicted(output: list[int]) -> tuple[int, ...]:
    """The output with a token changed, one left out and three put in."""
    return (*output[:9], (output[9] + 1) % VOCAB_SIZE, *output[10:17], *output[18:24], 7, 7, 7, *output[24:])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tree_size": 16}, list(PARAMETERS)),
        ({"tree_size": 8, "max_steps_in_flight": 1, "max_num_seqs": 3}, list(PARAMETERS)),
        pytest.param(CAPTURED, ["greedy", "sampled"], id="kernels", marks=pytest.mark.long),
    ],
)
def test_a_prediction_saves_steps_and_changes_no_token(options, names):
    loaded = tiny_model(ARCHITECTURE)
    # short prompts, in which there is nothing to find
    requests = [([5, 9, 11 + number], PARAMETERS[name]) for number, name in enumerate(names)]
    plain = run(make_engine(loaded, None, tree_size=1, mode="eager"), requests)
    with_prediction = [
        (prompt, dataclasses.replace(params, prediction=predicted(plain[number, 0].token_ids)))
        for number, (prompt, params) in enumerate(requests)
        if len(plain[number, 0].token_ids) > 24
    ]
    requests = [(prompt, dataclasses.replace(params, prediction=())) for prompt, params in with_prediction]
    plain = run(make_engine(loaded, None, tree_size=1, mode="eager"), requests)
    without = run(make_engine(loaded, None, prompt_lookup=True, **options), requests)
    outputs = run(make_engine(loaded, None, prompt_lookup=True, **options), with_prediction)
    assert len(outputs) > 1
    for key, output in outputs.items():
        assert (output.token_ids, output.finish_reason) == (plain[key].token_ids, plain[key].finish_reason)
        if with_prediction[key[0]][1].is_speculation_enabled:
            assert output.num_accepted > 20
            assert output.num_accepted > without[key].num_accepted
