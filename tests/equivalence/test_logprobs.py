"""Log-probabilities are the model's own, whatever was drawn, drafted, batched, cached or preempted on the way."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from medusa_core.model.loader import LoadedModel
from medusa_core.outputs import FinishReason, TokenLogprob
from medusa_core.params import SamplingParams
from tests.equivalence.driver import Output, make_engine, run
from tests.equivalence.models import VOCAB_SIZE, oracle_heads, tiny_model

ARCHITECTURE = "qwen2"
PARAMETERS = [
    SamplingParams(temperature=0.0, max_tokens=20, num_logprobs=4),
    SamplingParams(temperature=0.0, max_tokens=20),
    SamplingParams(temperature=1.3, top_p=0.8, seed=2, max_tokens=20, num_logprobs=0),
    SamplingParams(temperature=0.8, seed=3, max_tokens=20, num_logprobs=20, n=3, num_prompt_logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=20, frequency_penalty=1.5, logit_bias=((7, 9.0),), num_logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=3, num_logprobs=1, num_prompt_logprobs=0),
    SamplingParams(temperature=0.0, max_tokens=0, num_prompt_logprobs=5),
    SamplingParams(temperature=1.0, seed=4, max_tokens=9, num_logprobs=3, is_speculation_enabled=False),
]
VARIANTS = {
    "plain": {"tree_size": 1},
    "tree of 16": {"tree_size": 16},
    "small chunks": {"max_step_tokens": 5, "max_steps_in_flight": 1},
    "preemption": {"num_blocks": 31, "block_size": 4, "max_model_len": 60, "tree_size": 8, "max_steps_in_flight": 1},
    "kernels": {"mode": "captured", "max_num_seqs": 3, "max_step_rows": 24, "tree_size": 8, "max_step_tokens": 16},
}


def prompts() -> list[list[int]]:
    """A common start, so that the prefix cache could serve most of them."""
    generator = torch.Generator().manual_seed(5)
    return [[9, 8, 7, 6, 5, 4, 10, 11, 12, *torch.randint(4, VOCAB_SIZE, (11,), generator=generator).tolist()] for _ in PARAMETERS]


def expected_logprobs(loaded: LoadedModel, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """Of all tokens but the first, by transformers in one pass."""
    model = loaded.model
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits_TV = model(input_ids=torch.tensor([token_ids], device=loaded.device), use_cache=False).logits[0].float()
    model.set_attn_implementation(implementation)
    logprobs_TV = logits_TV.double().log_softmax(dim=-1)
    top = logprobs_TV.topk(num_top, dim=-1)
    return [
        TokenLogprob(float(logprobs_TV[position, token_id]), top.indices[position].tolist(), top.values[position].tolist())
        for position, token_id in enumerate(token_ids[1:])
    ]


def check_entries(actual: list[TokenLogprob], expected: list[TokenLogprob]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert ours.top_ids == theirs.top_ids
        assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-4)


def check(loaded: LoadedModel, outputs: dict[tuple[int, int], Output]) -> None:
    for (number, _), output in outputs.items():
        params, prompt = PARAMETERS[number], prompts()[number]
        if params.num_logprobs is None:
            assert output.logprobs == []
        else:
            expected = expected_logprobs(loaded, prompt + output.token_ids, params.num_logprobs)
            check_entries(output.logprobs, expected[len(prompt) - 1 :])
        if params.num_prompt_logprobs is None:
            assert output.prompt_logprobs == []
        else:
            check_entries(output.prompt_logprobs, expected_logprobs(loaded, prompt, params.num_prompt_logprobs))


@pytest.mark.parametrize(
    "variant", [pytest.param(variant, marks=[pytest.mark.long] if variant == "kernels" else []) for variant in VARIANTS]
)
def test_logprobs_are_those_of_transformers(variant):
    options = dict(VARIANTS[variant])
    loaded = dataclasses.replace(tiny_model(ARCHITECTURE), max_model_len=options.pop("max_model_len", 256))
    parameters = PARAMETERS
    if variant == "kernels":
        # the interpreter runs programs one by one
        parameters = [dataclasses.replace(params, max_tokens=min(params.max_tokens or 0, 6), n=1) for params in PARAMETERS]
    requests = list(zip(prompts(), parameters, strict=True))
    plain = run(make_engine(loaded, None, mode="eager"), requests)
    heads = oracle_heads(loaded, [prompts()[number] + output.token_ids for (number, _), output in plain.items()])
    core = make_engine(loaded, heads, **options)
    outputs = run(core, requests, arrive_every=1)
    check(loaded, outputs)
    assert {key: output.token_ids for key, output in outputs.items()} == {key: output.token_ids for key, output in plain.items()}
    if variant != "plain":
        assert sum(output.num_accepted for (number, _), output in outputs.items() if PARAMETERS[number].num_logprobs) > 3
    if variant == "preemption":
        assert core.stats().num_preemptions_total > 0


def test_a_prompt_is_scored_without_an_answer():
    """As long as the context: there is no room for a token, and none is needed."""
    loaded = dataclasses.replace(tiny_model(ARCHITECTURE), max_model_len=20)
    outputs = run(make_engine(loaded, None), [(prompts()[6], PARAMETERS[6])])
    assert outputs[0, 0].token_ids == []
    assert outputs[0, 0].finish_reason is FinishReason.LENGTH
    check_entries(outputs[0, 0].prompt_logprobs, expected_logprobs(loaded, prompts()[6], 5))


@pytest.mark.parametrize("arrive_every", [3, 4, 5])
def test_a_prompt_that_is_preempted_while_it_is_computed_is_scored_whole(arrive_every):
    """Its chunks are cut elsewhere the second time: at first it shares the budget with another prompt."""
    loaded = dataclasses.replace(tiny_model(ARCHITECTURE), max_model_len=128)
    generator = torch.Generator().manual_seed(8)
    texts = [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (8, 8, 45, 90)]
    core = make_engine(loaded, None, tree_size=1, num_blocks=50, block_size=4, max_num_seqs=4, max_step_tokens=8)
    params = [SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True) for max_tokens in (90, 90, 40)]
    scored = SamplingParams(temperature=0.0, max_tokens=2, num_prompt_logprobs=1)
    outputs = run(core, list(zip(texts, [*params, scored], strict=True)), arrive_every=arrive_every)
    check_entries(outputs[3, 0].prompt_logprobs, expected_logprobs(loaded, texts[3], 1))
    assert core.stats().num_preemptions_total > 0


def test_a_cached_prompt_is_scored_anew():
    loaded = tiny_model(ARCHITECTURE)
    core = make_engine(loaded, None)
    outputs = [run(core, [(prompts()[5], PARAMETERS[5])])[0, 0] for _ in range(2)]
    assert core.stats().num_prefix_hit_tokens_total == 0
    assert outputs[0] == outputs[1]
    # the blocks that it left serve those who ask for less
    run(core, [(prompts()[5], SamplingParams(temperature=0.0, max_tokens=3, num_logprobs=1))])
    assert core.stats().num_prefix_hit_tokens_total == 16
