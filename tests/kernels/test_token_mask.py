"""Masks of tokens on logits: the kernel does what the reference does, and the reference what the bits say."""

import numpy as np
import pytest
import torch

from medusa_core.kernels import token_mask as kernel
from medusa_core.sampling import token_mask as reference
from tests import options


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 5), (3, 32), (2, 97), (3, 4096), (2, 9001), (0, 64)])
def test_tokens_without_their_bit_are_gone_and_others_as_they_were(num_rows, vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator).to(options.device)
    is_allowed_RV = torch.rand(num_rows, vocab_size, generator=generator) < 0.4
    # one more word than it takes
    num_words = -(-vocab_size // 32) + 1
    padded = np.zeros((num_rows, 32 * num_words), dtype=bool)
    padded[:, :vocab_size] = is_allowed_RV.numpy()
    bits_RW = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32)).to(options.device)
    expected_RV = torch.where(is_allowed_RV.to(options.device), logits_RV, -torch.inf)
    for mask_tokens_ in (kernel.mask_tokens_, reference.mask_tokens_):
        # rows of a wider matrix
        wide_RV = torch.cat([logits_RV, logits_RV], dim=1)
        mask_tokens_(wide_RV[:, :vocab_size], bits_RW)
        assert torch.equal(wide_RV, torch.cat([expected_RV, logits_RV], dim=1))
