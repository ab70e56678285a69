"""Split, norm, rotary embedding and cache write in one launch, against transformers' own functions."""

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from medusa_core.kernels.rotary import rotate_and_write
from tests import options

DTYPES = [torch.float32, torch.float16] + ([] if options.device == "cpu" else [torch.bfloat16])
NUM_SLOTS = 40


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(options.device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 12), (2, 2, 64)])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_queries_are_rotated_and_the_cache_is_written(num_heads, num_kv_heads, head_dim, has_norm, num_rows, dtype):
    qkv = randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(num_rows, head_dim, generator=torch.Generator().manual_seed(1)) * 6
    cos, sin = angles.cos().to(options.device, dtype), angles.sin().to(options.device, dtype)
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(2))[:num_rows].to(options.device)
    # two layers in one tensor, as the store keeps them: slots of one layer are a view
    keys, values = (torch.full((2, NUM_SLOTS, num_kv_heads, head_dim), 7.0, dtype=dtype, device=options.device) for _ in range(2))
    norms = [Qwen3RMSNorm(head_dim, eps=1e-5).to(options.device, dtype) for _ in range(2)] if has_norm else []
    for seed, norm in enumerate(norms):
        norm.weight.data = randn(head_dim, dtype=dtype, seed=seed + 3)

    query = rotate_and_write(
        qkv,
        cos,
        sin,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        slots_T=slots,
        key_slots_SGD=keys[1],
        value_slots_SGD=values[1],
        q_norm_D=norms[0].weight.data if has_norm else None,
        k_norm_D=norms[1].weight.data if has_norm else None,
        eps=1e-5,
    )

    heads = qkv.view(num_rows, -1, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if has_norm:
        q, k = norms[0](q).detach(), norms[1](k).detach()
    q, k = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    if has_norm:
        # Statistics are summed in another order: a few normed values round the other way, by one unit in the last place of
        # theirs, which the rotation leaves in a sum that may be much smaller than they are.
        for actual, expected in ((query, q[0]), (keys[1][slots], k[0])):
            unit = torch.finfo(dtype).eps * float(expected.float().abs().max())
            torch.testing.assert_close(actual, expected, rtol=0, atol=2 * unit if dtype != torch.float32 else 1e-5)
            assert dtype == torch.float32 or (actual == expected).float().mean() > 0.9
    else:
        torch.testing.assert_close(query, q[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
        torch.testing.assert_close(keys[1][slots], k[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
    assert torch.equal(values[1][slots], v)
    is_other = torch.ones(NUM_SLOTS, dtype=torch.bool, device=options.device).index_fill(0, slots, False)
    for written in (keys, values):
        assert (written[0] == 7).all()
        assert (written[1][is_other] == 7).all()


def test_layouts_the_kernel_does_not_read_are_refused():
    slots = torch.zeros(2, dtype=torch.int64, device=options.device)
    cache = torch.zeros(4, 1, 8, device=options.device)
    qkv, cos = randn(2, 32, dtype=torch.float32), randn(2, 8, dtype=torch.float32)
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    rotate_and_write(qkv, cos, cos, **sizes, slots_T=slots, key_slots_SGD=cache, value_slots_SGD=cache.clone())
    wrong = [
        (qkv[:, :-8].contiguous(), cos, slots, cache),  # a head too few
        (qkv, cos[:, :4].contiguous(), slots, cache),  # partial rotary
        (qkv, cos, slots.int(), cache),
        (qkv, cos, slots, torch.zeros(4, 8, 1, device=options.device).transpose(1, 2)),
    ]
    for states, cosines, where, keys in wrong:
        with pytest.raises(ValueError, match="must"):
            rotate_and_write(
                states, cosines, cosines, **sizes, slots_T=where, key_slots_SGD=keys, value_slots_SGD=torch.zeros_like(cache)
            )
