"""Steps on kernels and fused layers, captured where there is a GPU: the same tokens as the eager twin and transformers."""

import pytest
import torch

from tests.equivalence.models import ARCHITECTURES
from tests.equivalence.test_greedy import check

# Two lanes of small trees: the interpreter runs programs one by one.
_SMALL = {"mode": "captured", "max_num_seqs": 2, "max_step_rows": 16, "tree_size": 8, "max_step_tokens": 64}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_the_kernels_give_the_tokens_of_transformers(architecture):
    """Fused layers; windows and soft caps; sinks."""
    check(architecture, **_SMALL, prompt_numbers=(0, 2), max_tokens=6)


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
