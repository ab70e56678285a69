"""Steps on kernels and fused layers, captured where there is a GPU: the same tokens as the eager twin and transformers."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_core.engine.build import CalibratedHeads
from medusa_core.model.loader import LoadedModel
from medusa_core.model.sequential_heads import GatedBlock, HeadsShape, SequentialHeads
from medusa_core.params import SamplingParams
from medusa_core.speculation.kernel_drafter import suits
from tests import options
from tests.equivalence.driver import make_engine, run
from tests.equivalence.models import ARCHITECTURES, MAX_MODEL_LEN, load_in_memory, oracle_heads, tiny_model
from tests.equivalence.test_greedy import check

# Two lanes of small trees: the interpreter runs programs one by one.
_SMALL = {"mode": "captured", "max_num_seqs": 2, "max_step_rows": 16, "tree_size": 8, "max_step_tokens": 64}


# the others are with the long tests
@pytest.mark.parametrize("architecture", ["gemma2"])
def test_the_kernels_give_the_tokens_of_transformers(architecture):
    """Windows and soft caps."""
    check(architecture, **_SMALL, prompt_numbers=(0, 2), max_tokens=6)


@pytest.mark.long
def test_penalties_on_kernels_count_along_the_path():
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, frequency_penalty=2.0, repetition_penalty=20.0),
        SamplingParams(temperature=1.0, seed=5, max_tokens=12, presence_penalty=1.5, logit_bias=((7, 5.0), (9, -100.0))),
        # negative: tokens are repeated, so that a path of the tree holds some more than once
        SamplingParams(temperature=0.0, max_tokens=12, frequency_penalty=-2.0),
        SamplingParams(temperature=0.0, max_tokens=12),
    ]
    requests = [([5, 21 + number, 33], params) for number, params in enumerate(params)]
    loaded = tiny_model("llama")
    plain = run(make_engine(loaded, None, mode="eager"), requests)
    heads = oracle_heads(loaded, [prompt + plain[number, 0].token_ids for number, (prompt, _) in enumerate(requests)])
    outputs = run(make_engine(loaded, heads, **_SMALL), requests)
    assert {key: output.token_ids for key, output in outputs.items()} == {key: output.token_ids for key, output in plain.items()}
    assert all(output.num_accepted > 0 for output in outputs.values())
    # the penalties do something
    without = run(make_engine(loaded, None, mode="eager"), [(prompt, params[3]) for prompt, _ in requests])
    assert [plain[number, 0].token_ids == without[number, 0].token_ids for number in range(4)] == [False, False, False, True]


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_on_kernels(architecture):
    check(architecture, **_SMALL, prompt_numbers=(0, 2, 3))


@pytest.mark.cuda
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_eager_twin_on_a_gpu(architecture):
    check(architecture, mode="eager")


@pytest.mark.cuda
def test_float32_products_are_ieee():
    """No TF32: its rounding is a thousand times that of float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = (a.double() @ b.double()).float()
    error = ((a.cuda() @ b.cuda()).cpu() - exact).norm() / exact.norm()
    assert error < 1e-6


# Enough for heads that are drafted by kernels.
_LARGE_VOCAB = 8320
_WIDTH = 48


def successor_model() -> tuple[LoadedModel, SequentialHeads]:
    """A float16 model that follows each token with one that belongs to it, and sequential heads that know which one that is."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=_LARGE_VOCAB,
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.02,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    embedding_VE = torch.randn(_LARGE_VOCAB, _WIDTH)
    model.get_input_embeddings().weight.data.copy_(embedding_VE)
    model.get_output_embeddings().weight.data[torch.randperm(_LARGE_VOCAB)] = embedding_VE
    loaded = load_in_memory(model.half())
    loaded = dataclasses.replace(loaded, dtype=torch.float16, vocab_size=_LARGE_VOCAB, eos_token_ids=())

    heads = SequentialHeads(
        HeadsShape(num_heads=3, mlp_size=_WIDTH), hidden_size=_WIDTH, vocab_size=_LARGE_VOCAB, base_vocab_size=_LARGE_VOCAB
    )
    block = heads.blocks[0][0]
    assert isinstance(block, GatedBlock)
    # state + (embedding - state), both divided by their root mean square, as the state is already
    gate_up_2IJ = torch.zeros(2 * _WIDTH, 2 * _WIDTH)
    gate_up_2IJ[1::2] = torch.cat([-torch.eye(_WIDTH), torch.eye(_WIDTH)], dim=1)
    block.get_parameter("gate_up.weight").data.copy_(gate_up_2IJ)
    block.bias_SJ.data[:, ::2] = 1.0
    block.get_parameter("down.weight").data.copy_(torch.eye(_WIDTH) / functional.silu(torch.tensor(1.0)))
    return loaded, heads.requires_grad_(False).to(options.device, torch.float16)


@pytest.mark.long
def test_sequential_heads_on_kernels_are_right_and_change_nothing():
    loaded, heads = successor_model()
    assert suits(heads, loaded)
    requests = [([5, 9, 700 + number], SamplingParams(temperature=0.0, max_tokens=9)) for number in range(2)]
    with_heads = {"tree_size": 8, "prompt_lookup": False, "max_num_seqs": 2, "max_step_rows": 16, "max_step_tokens": 64}
    plain = run(make_engine(loaded, None, mode="eager"), requests)
    assert len(set(plain[0, 0].token_ids)) == 9
    for mode in ("eager", "captured"):
        outputs = run(make_engine(loaded, CalibratedHeads(heads), **with_heads, mode=mode), requests)
        for key, output in outputs.items():
            assert output.token_ids == plain[key].token_ids, mode
            # the first token belongs to no step; then four and four
            assert (output.num_accepted, output.num_draft_steps) == (6, 2), mode
