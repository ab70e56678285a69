"""Greedy output of the engine == transformers `generate`, token for token, in float32."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from medusa_core.outputs import FinishReason
from medusa_core.params import SamplingParams
from tests import options
from tests.equivalence.driver import make_engine, run
from tests.equivalence.models import ARCHITECTURES, EOS_ID, MAX_MODEL_LEN, VOCAB_SIZE, load_in_memory, oracle_heads, tiny_model

NUM_NEW_TOKENS = 24
# One longer than the windows, one a multiple of the block size, one a single token, two with a prefix in common.
PROMPT_LENS = (29, 16, 1, 40, 43)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENS]
    prompts[4] = prompts[3][:33] + prompts[4][33:]
    return prompts


def reference(architecture: str, **generation: object) -> list[list[int]]:
    """transformers' own greedy continuation of each prompt, up to EOS."""
    keywords = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, **generation}
    model = tiny_model(architecture).model
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = []
    for prompt in make_prompts():
        ids = torch.tensor([prompt], device=model.device)
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), **keywords)
        outputs.append(generated[0, len(prompt) :].tolist())
    model.set_attn_implementation(implementation)
    return outputs


_REFERENCES: dict[str, list[list[int]]] = {}


def cached_reference(architecture: str) -> list[list[int]]:
    if architecture not in _REFERENCES:
        _REFERENCES[architecture] = reference(architecture)
    return _REFERENCES[architecture]


def check(
    architecture: str,
    *,
    arrive_every: int = 0,
    needs_acceptance: bool = True,
    max_model_len: int = MAX_MODEL_LEN,
    prompt_numbers: Sequence[int] = range(len(PROMPT_LENS)),
    max_tokens: int = NUM_NEW_TOKENS,
    **options: object,
) -> int:
    """Run the prompts and compare; returns the number of preemptions."""
    loaded = dataclasses.replace(tiny_model(architecture), max_model_len=max_model_len)
    prompts = [make_prompts()[number] for number in prompt_numbers]
    expected = [cached_reference(architecture)[number][:max_tokens] for number in prompt_numbers]
    heads = oracle_heads(loaded, [p + e for p, e in zip(prompts, expected, strict=True)])
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    core = make_engine(loaded, heads, **options)
    outputs = run(core, [(prompt, params) for prompt in prompts], arrive_every=arrive_every)
    for number, tokens in enumerate(expected):
        output = outputs[number, 0]
        assert output.token_ids == tokens
        assert output.finish_reason is (FinishReason.STOP if tokens[-1] == EOS_ID else FinishReason.LENGTH)
    accepted = sum(output.num_accepted for output in outputs.values())
    assert (accepted > 0) == needs_acceptance
    return core.stats().num_preemptions_total


@pytest.mark.parametrize("steps_in_flight", [0, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_a_tree(architecture, steps_in_flight):
    check(architecture, max_steps_in_flight=steps_in_flight)


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    loaded, prompts = tiny_model("qwen2"), make_prompts()
    expected = reference("qwen2", max_new_tokens=20, repetition_penalty=penalty)
    heads = oracle_heads(loaded, [p + e for p, e in zip(prompts, expected, strict=True)])
    params = SamplingParams(temperature=0.0, max_tokens=20, repetition_penalty=penalty)
    outputs = run(make_engine(loaded, heads), [(prompt, params) for prompt in prompts])
    assert [outputs[number, 0].token_ids for number in range(len(prompts))] == expected
    assert sum(output.num_accepted for output in outputs.values()) > 20
    assert expected != [tokens[:20] for tokens in cached_reference("qwen2")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_without_speculation(architecture):
    check(architecture, tree_size=1, needs_acceptance=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_under_preemption(architecture):
    """A pool of one and a half requests: the engine must preempt, and nobody can tell from the tokens."""
    num_preemptions = check(architecture, max_model_len=72, num_blocks=12, block_size=8, tree="chain-3", tree_size=4)
    assert num_preemptions > 0


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    architecture=st.sampled_from(["llama", "gemma2", "gpt_oss"]),
    tree=st.sampled_from(["mc", "chain", "one"]),
    block_size=st.sampled_from([1, 4, 8, 16, 64]),
    max_step_tokens=st.sampled_from([3, 8, 17, 512]),
    enable_prefix_cache=st.booleans(),
    max_num_seqs=st.sampled_from([1, 2, 8]),
    max_steps_in_flight=st.sampled_from([0, 1]),
    arrive_every=st.sampled_from([0, 1, 5]),
)
def test_any_combination_of_options(tree, architecture, block_size, arrive_every, **options):
    options["tree_size"] = {"mc": 32, "chain": 4, "one": 1}[tree]
    num_blocks = 8 * (-(-(256 + 64) // block_size))
    check(
        architecture,
        arrive_every=arrive_every,
        needs_acceptance=tree != "one",
        block_size=block_size,
        num_blocks=num_blocks,
        **options,
    )


def test_learned_positions_up_to_the_end_of_the_context():
    """Trees of the last steps reach beyond the context, where such a model has no embedding to look up."""
    context_len = 32
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=context_len, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3)
    loaded = load_in_memory(GPT2LMHeadModel(config), max_model_len=context_len)
    prompt = [5, 6, 7]
    ids = torch.tensor([prompt], device=options.device)
    num_new = context_len - len(prompt)
    generated = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=0
    )[0].tolist()
    core = make_engine(loaded, oracle_heads(loaded, [generated]), tree_size=32)
    outputs = run(core, [(prompt, SamplingParams(temperature=0.0, ignore_eos=True))])
    assert outputs[0, 0].token_ids == generated[len(prompt) :]
    assert outputs[0, 0].num_accepted > 0


@pytest.mark.parametrize("max_model_len", [2, 3, 5])
def test_a_context_shorter_than_the_self_checks_text(max_model_len):
    loaded = dataclasses.replace(tiny_model("llama"), max_model_len=max_model_len)
    outputs = run(make_engine(loaded, None, num_blocks=8), [([7], SamplingParams(temperature=0.0, ignore_eos=True))])
    assert len(outputs[0, 0].token_ids) == max_model_len - 1
