"""Sampled output does not depend on speculation, tree, batch, chunking, prefix cache or preemption: same seed, same tokens."""

import dataclasses

import pytest
import torch

from medusa_core.params import SamplingParams
from tests.equivalence.driver import Output, make_engine, run
from tests.equivalence.models import EOS_ID, VOCAB_SIZE, oracle_heads, tiny_model

ARCHITECTURE = "qwen2"
PARAMETERS = {
    "temperature": SamplingParams(temperature=0.9, seed=1, max_tokens=30),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8, seed=2, max_tokens=30),
    "top_k": SamplingParams(top_k=5, seed=3, max_tokens=30),
    "min_p": SamplingParams(temperature=1.5, min_p=0.1, seed=4, max_tokens=30),
    "all filters": SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.02, seed=5, max_tokens=30),
    "min_tokens": SamplingParams(temperature=1.0, seed=6, max_tokens=30, min_tokens=12, stop_token_ids=tuple(range(40))),
    "greedy min_tokens": SamplingParams(temperature=0.0, max_tokens=30, min_tokens=9, stop_token_ids=tuple(range(60))),
    "stop ids": SamplingParams(temperature=1.0, seed=7, max_tokens=60, stop_token_ids=tuple(range(10, 20))),
    "ignore_eos": SamplingParams(temperature=1.0, seed=8, max_tokens=80, ignore_eos=True, top_k=30),
    "negative seed": SamplingParams(temperature=1.0, seed=-(2**63), max_tokens=20),
    "one token": SamplingParams(temperature=1.0, seed=9, max_tokens=1),
    "penalties": SamplingParams(temperature=0.7, seed=12, max_tokens=40, presence_penalty=0.8, frequency_penalty=1.5),
    "negative penalties": SamplingParams(temperature=1.0, seed=13, max_tokens=40, presence_penalty=-1.5, frequency_penalty=-0.5),
    "repetition": SamplingParams(temperature=0.9, seed=14, max_tokens=40, repetition_penalty=1.4, top_p=0.9),
    "greedy penalties": SamplingParams(temperature=0.0, max_tokens=40, frequency_penalty=2.0, repetition_penalty=1.1),
    "bias": SamplingParams(temperature=1.0, seed=15, max_tokens=40, logit_bias=((7, 6.0), (9, -100.0), (30, 3.5))),
    "greedy bias": SamplingParams(temperature=0.0, max_tokens=40, logit_bias=((11, 4.0), (12, -100.0)), presence_penalty=0.3),
    "n": SamplingParams(temperature=1.0, seed=10, max_tokens=20, n=3),
    "speculation off for one": SamplingParams(temperature=1.0, seed=11, max_tokens=20, is_speculation_enabled=False),
}
VARIANTS = {
    "tree of 48": {"tree_size": 48},
    "tree of 4, one step in flight": {"tree_size": 4, "max_steps_in_flight": 1},
    "small chunks, no prefix cache": {"max_step_tokens": 5, "enable_prefix_cache": False},
    "one lane": {"max_num_seqs": 1},
    "preemption": {"num_blocks": 24, "max_model_len": 120, "tree_size": 8, "max_steps_in_flight": 1},
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = [7 + 3 * i for i in range(len(PARAMETERS))]
    return [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def plain() -> dict[tuple[int, int], Output]:
    """Each request alone in an engine without speculation."""
    outputs: dict[tuple[int, int], Output] = {}
    for number, (prompt, params) in enumerate(zip(prompts(), PARAMETERS.values(), strict=True)):
        alone = run(make_engine(tiny_model(ARCHITECTURE), None, tree_size=1), [(prompt, params)])
        outputs |= {(number, choice): output for (_, choice), output in alone.items()}
    return outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_tokens(variant, plain):
    options = dict(VARIANTS[variant])
    loaded = dataclasses.replace(tiny_model(ARCHITECTURE), max_model_len=options.pop("max_model_len", 256))
    heads = oracle_heads(loaded, [prompts()[number] + output.token_ids for (number, _), output in plain.items()])
    core = make_engine(loaded, heads, **options)
    outputs = run(core, list(zip(prompts(), PARAMETERS.values(), strict=True)), arrive_every=1)
    names = list(PARAMETERS)
    for (number, choice), expected in plain.items():
        actual = outputs[number, choice]
        assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, expected.finish_reason), names[number]
        if names[number] == "speculation off for one":
            assert actual.num_draft_steps == 0
    assert sum(output.num_accepted for output in outputs.values()) > 20
    if variant == "preemption":
        assert core.stats().num_preemptions_total > 0


def test_the_first_of_n_equals_n_of_one_and_the_others_differ(plain):
    number = list(PARAMETERS).index("n")
    params = dataclasses.replace(PARAMETERS["n"], n=1)
    alone = run(make_engine(tiny_model(ARCHITECTURE), None, tree_size=1), [(prompts()[number], params)])
    choices = [plain[number, choice].token_ids for choice in range(3)]
    assert alone[0, 0].token_ids == choices[0]
    assert len({tuple(tokens) for tokens in choices}) == 3


def test_requests_without_a_seed_differ():
    # Two that end at once would be equal, which happens once in some 300 times.
    params = SamplingParams(temperature=1.5, max_tokens=12, n=4, ignore_eos=True)
    outputs = run(make_engine(tiny_model(ARCHITECTURE), None, tree_size=1), [(prompts()[0], params)] * 2)
    assert len({tuple(output.token_ids) for output in outputs.values()}) == 8


def test_min_tokens_and_stop_ids_did_something(plain):
    """The comparisons above would also hold if these parameters were ignored."""
    names = list(PARAMETERS)
    assert len(plain[names.index("min_tokens"), 0].token_ids) >= 13
    stopped = plain[names.index("stop ids"), 0].token_ids
    assert stopped[-1] in range(10, 20)
    assert not set(stopped[:-1]) & set(range(10, 20))
    assert len(plain[names.index("ignore_eos"), 0].token_ids) == 80
    assert all(EOS_ID not in output.token_ids[:-1] for (n, _), output in plain.items() if names[n] != "ignore_eos")


def test_siblings_share_the_prompts_blocks():
    """n = 4 over a prompt of 10 full blocks needs far fewer than four prompts' blocks at once."""
    prompt = torch.randint(4, VOCAB_SIZE, (81,), generator=torch.Generator().manual_seed(3)).tolist()
    core = make_engine(tiny_model(ARCHITECTURE), None, tree_size=1, enable_prefix_cache=False)
    run(core, [(prompt, SamplingParams(temperature=1.0, seed=1, max_tokens=8, n=4))])
    assert core.stats().num_prefix_hit_tokens_total == 3 * 80


def test_a_repeated_prompt_hits_the_prefix_cache():
    prompt = torch.randint(4, VOCAB_SIZE, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    core = make_engine(tiny_model(ARCHITECTURE), None, tree_size=1)
    params = SamplingParams(temperature=0.0, max_tokens=5)
    first = run(core, [(prompt, params)])
    assert core.stats().num_prefix_hit_tokens_total == 0
    second = run(core, [(prompt, params)])
    assert core.stats().num_prefix_hit_tokens_total == 48
    assert first[0, 0].token_ids == second[0, 0].token_ids
