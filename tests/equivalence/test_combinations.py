"""Any combination of parameters gives the same tokens and log-probabilities with speculation on and off."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_core.params import SamplingParams
from tests.equivalence.driver import make_engine, run
from tests.equivalence.models import VOCAB_SIZE, oracle_heads, tiny_model

TOKENS = st.integers(0, VOCAB_SIZE - 1)


@st.composite
def some_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 14))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.3])),
        top_k=draw(st.sampled_from([0, 0, 1, 7])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.8, -2.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        logit_bias=tuple(draw(st.dictionaries(TOKENS, st.floats(-100, 100, width=32), max_size=3)).items()),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=tuple(draw(st.sets(TOKENS, max_size=20))),
        ignore_eos=draw(st.booleans()),
        num_logprobs=draw(st.sampled_from([None, 0, 3])),
        num_prompt_logprobs=draw(st.sampled_from([None, None, 2])),
        n=draw(st.sampled_from([1, 1, 2])),
        is_speculation_enabled=draw(st.sampled_from([True, True, True, False])),
    )


REQUESTS = st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=20), some_params()), min_size=1, max_size=4)


def check(requests: list[tuple[list[int], SamplingParams]], arrive_every: int) -> None:
    loaded = tiny_model("qwen2")
    plain = run(make_engine(loaded, None, tree_size=1), requests)
    heads = oracle_heads(loaded, [requests[number][0] + output.token_ids for (number, _), output in plain.items()])
    outputs = run(make_engine(loaded, heads, tree_size=16), requests, arrive_every=arrive_every)
    assert outputs.keys() == plain.keys()
    for key, expected in plain.items():
        actual = outputs[key]
        assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, expected.finish_reason)
        for ours, theirs in zip(
            actual.logprobs + actual.prompt_logprobs, expected.logprobs + expected.prompt_logprobs, strict=True
        ):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(REQUESTS, st.integers(0, 2))
def test_a_few_combinations(requests, arrive_every):
    check(requests, arrive_every)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.integers(0, 2))
def test_many_combinations(requests, arrive_every):
    check(requests, arrive_every)
