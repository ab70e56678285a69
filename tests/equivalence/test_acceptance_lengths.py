"""However many drafts a step accepts, none, one or all, the output is the same."""

from __future__ import annotations

import dataclasses

import pytest

from medusa_core.engine.build import CalibratedHeads
from medusa_core.params import SamplingParams
from tests.equivalence.driver import make_engine, run
from tests.equivalence.models import ForcedHeads, tiny_model

DEPTH = ForcedHeads.num_heads
PARAMETERS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=22),
    "seed": SamplingParams(temperature=1.1, seed=3, max_tokens=22),
    "penalties": SamplingParams(temperature=0.7, seed=4, max_tokens=22, presence_penalty=0.9, frequency_penalty=-1.0),
    "repetition": SamplingParams(temperature=0.0, max_tokens=22, repetition_penalty=1.7),
    "bias": SamplingParams(temperature=1.0, seed=5, max_tokens=22, logit_bias=((11, 5.0), (12, -100.0)), min_p=0.02),
    # stop ids come early: 20 of 97 tokens
    "min_tokens": SamplingParams(temperature=1.0, seed=6, max_tokens=22, min_tokens=9, stop_token_ids=tuple(range(20, 40))),
    "stop ids": SamplingParams(temperature=1.0, seed=7, max_tokens=60, stop_token_ids=tuple(range(30, 36))),
    # in the middle of a step, whatever it accepts
    "max_tokens": SamplingParams(temperature=0.0, max_tokens=7, num_logprobs=2),
    "logprobs": SamplingParams(temperature=1.4, seed=8, max_tokens=22, num_logprobs=3, top_k=40),
}
PROMPTS = {name: [5 + number, 61, 17, 30 + number] for number, name in enumerate(PARAMETERS)}


@pytest.mark.parametrize("depth", [0, 1, DEPTH])
def test_same_output(depth):
    check(depth, PARAMETERS, mode="eager")


@pytest.mark.long
@pytest.mark.parametrize("depth", [0, 1, DEPTH])
def test_same_output_on_kernels(depth):
    """Short: the interpreter runs programs one by one."""
    params = {name: dataclasses.replace(PARAMETERS[name], max_tokens=8) for name in ("penalties", "logprobs")}
    check(depth, params, mode="captured")


def check(depth: int, parameters: dict[str, SamplingParams], *, mode: str) -> None:
    loaded, names = tiny_model("llama"), list(parameters)
    requests = [(PROMPTS[name], params) for name, params in parameters.items()]
    plain = run(make_engine(loaded, None, mode="eager"), requests)
    heads = ForcedHeads(loaded, [prompt + plain[number, 0].token_ids for number, (prompt, _) in enumerate(requests)], depth)
    options = {"tree": f"chain-{DEPTH}", "tree_size": DEPTH + 1, "max_num_seqs": 2, "max_step_rows": 16, "max_step_tokens": 32}
    outputs = run(make_engine(loaded, CalibratedHeads(heads), mode=mode, **options), requests)
    for number, name in enumerate(names):
        actual, expected = outputs[number, 0], plain[number, 0]
        assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, expected.finish_reason), name
        for ours, theirs in zip(actual.logprobs, expected.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert ours.top_ids == theirs.top_ids
        # the first token comes with the prompt; a last step may be cut
        num_full_steps = (len(actual.token_ids) - 1) // (depth + 1)
        assert depth * num_full_steps <= actual.num_accepted <= depth * (num_full_steps + 1)
