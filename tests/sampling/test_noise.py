"""Noise is a pure function of (key, index, token id), the same on every device and in every release."""

import pytest
import torch

from medusa_core.sampling.noise import gumbel, hash_bits

_MASK64, _MASK32 = 2**64 - 1, 2**32 - 1


def splitmix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def lowbias32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def plain_bits(key: int, index: int, token_id: int) -> int:
    """The definition, in Python's integers."""
    state = splitmix64((key + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64)
    return lowbias32(lowbias32(token_id ^ (state & _MASK32)) ^ (state >> 32))


def bits(key: int, index: int, num_tokens: int, device: str = "cpu") -> list[int]:
    signed = key - 2**64 if key >= 2**63 else key
    args = torch.tensor([signed], device=device), torch.tensor([index], device=device)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    return [b & _MASK32 for b in hash_bits(*args, tokens)[0].tolist()]


@pytest.mark.parametrize("key", [0, 1, 12345678901234567890, 2**64 - 1, 2**63])
@pytest.mark.parametrize("index", [0, 1, 100_000])
def test_equals_the_definition(key, index):
    assert bits(key, index, 300) == [plain_bits(key, index, t) for t in range(300)]


def test_golden_bits():
    """Changing these changes the answer to every seeded request that users have stored."""
    assert bits(0, 0, 4) == [plain_bits(0, 0, t) for t in range(4)] == GOLDEN


GOLDEN = [2133699716, 3733818237, 4075731012, 608131580]


@pytest.mark.cuda
def test_same_bits_on_cuda():
    assert bits(987654321, 17, 152_000, "cuda") == bits(987654321, 17, 152_000)


def test_rows_do_not_depend_on_each_other():
    keys, indices = torch.tensor([5, 6, 7]), torch.tensor([0, 3, 9])
    tokens = torch.arange(50, dtype=torch.int32)
    together = gumbel(keys, indices, tokens)
    for row in range(3):
        assert torch.equal(together[row : row + 1], gumbel(keys[row : row + 1], indices[row : row + 1], tokens))


def test_bits_are_balanced_across_tokens_indices_and_keys():
    """Each of 32 bits is set in half of 2**16 samples, within 6 standard deviations, along each axis of the counter."""
    tokens = torch.arange(2**16, dtype=torch.int32)
    one_token = torch.zeros(1, dtype=torch.int32)
    sweep = torch.arange(2**16)
    fixed = torch.full_like(sweep, 3)
    for sample in (
        hash_bits(torch.tensor([3]), torch.tensor([3]), tokens).flatten(),
        hash_bits(fixed, sweep, one_token).flatten(),
        hash_bits(sweep, fixed, one_token).flatten(),
    ):
        for bit in range(32):
            ones = ((sample >> bit) & 1).sum().item()
            assert abs(ones - 2**15) < 6 * 2**7


def test_gumbel_is_finite_and_has_the_right_moments():
    noise = gumbel(torch.arange(200), torch.zeros(200, dtype=torch.int64), torch.arange(5000, dtype=torch.int32))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.02)


def test_a_large_flat_vocabulary_has_no_ties_at_the_top():
    noise = gumbel(torch.arange(20), torch.zeros(20, dtype=torch.int64), torch.arange(152_000, dtype=torch.int32))
    top = noise.topk(50, dim=1).values
    assert all(len(set(row.tolist())) == 50 for row in top)
