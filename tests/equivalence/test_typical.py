"""Typical acceptance in the engine: longer steps for those who ask, the same on kernels, and nothing changes for others."""

from __future__ import annotations

import dataclasses

import pytest

from medusa_core.params import SamplingParams
from tests.equivalence.driver import make_engine, run
from tests.equivalence.models import oracle_heads, tiny_model

EXACT = [
    SamplingParams(temperature=1.2, seed=1, max_tokens=24),
    SamplingParams(temperature=0.8, seed=2, max_tokens=24, frequency_penalty=0.5, min_tokens=9, stop_token_ids=(7, 8, 9)),
    SamplingParams(temperature=0.0, max_tokens=24),
]
TYPICAL = [dataclasses.replace(params, typical_acceptance=(1e-4, 1e-3)) for params in EXACT]
PROMPTS = [[5, 17, 30 + number] for number in range(3)]


def test_steps_are_longer_and_greedy_requests_stay_exact():
    loaded = tiny_model("qwen2")
    # what it would say at temperature 0: likely, but not what is drawn
    likely = run(make_engine(loaded, None), [(prompt, EXACT[2]) for prompt in PROMPTS])
    heads = oracle_heads(loaded, [prompt + likely[number, 0].token_ids for number, prompt in enumerate(PROMPTS)])
    exact = run(make_engine(loaded, heads), list(zip(PROMPTS, EXACT, strict=True)))
    typical = run(make_engine(loaded, heads), list(zip(PROMPTS, TYPICAL, strict=True)))
    for number in (0, 1):
        assert typical[number, 0].token_ids != exact[number, 0].token_ids
        assert typical[number, 0].num_accepted > exact[number, 0].num_accepted
    assert typical[2, 0].token_ids == exact[2, 0].token_ids


@pytest.mark.long
def test_kernels_accept_the_same():
    loaded = tiny_model("qwen2")
    likely = run(make_engine(loaded, None, mode="eager"), [(prompt, EXACT[2]) for prompt in PROMPTS])
    heads = oracle_heads(loaded, [prompt + likely[number, 0].token_ids for number, prompt in enumerate(PROMPTS)])
    small = {"max_num_seqs": 2, "max_step_rows": 16, "tree_size": 8, "max_step_tokens": 64}
    requests = [(prompt, dataclasses.replace(params, max_tokens=10)) for prompt, params in zip(PROMPTS, TYPICAL, strict=True)]
    eager = run(make_engine(loaded, heads, mode="eager", **small), requests)
    captured = run(make_engine(loaded, heads, mode="captured", **small), requests)
    assert {key: output.token_ids for key, output in captured.items()} == {key: output.token_ids for key, output in eager.items()}
    assert eager[0, 0].num_accepted > 0
