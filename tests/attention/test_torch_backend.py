"""Paged attention against attention written out key by key."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_core.attention.segments import AttentionParams, Segment
from medusa_core.attention.torch_backend import TorchAttention, attend_reference
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.tree.topology import TreeTopology

TREE = TreeTopology.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


def make_case(*, bases, num_heads, num_kv_heads, key_dim, value_dim, tree, seed=0, num_spare=3):
    """Random caches and queries for lanes of different lengths, their slots scattered over the store."""
    generator = torch.Generator().manual_seed(seed)
    num_nodes, num_lanes = tree.num_nodes, len(bases)
    width = max(bases) + num_nodes + num_spare
    num_slots = num_lanes * width + 1
    slots = torch.randperm(num_slots - 1, generator=generator).view(num_lanes, width)
    segment = Segment(0, torch.tensor(bases), tree.depth_N, tree.ancestor_mask_NN, slots)
    query = torch.randn(num_lanes, num_nodes, num_heads, key_dim, generator=generator)
    keys = torch.randn(num_slots, num_kv_heads, key_dim, generator=generator)
    values = torch.randn(num_slots, num_kv_heads, value_dim, generator=generator)
    return query, keys, values, segment


def plain_attention(query, keys, values, segment, params):
    """One lane, query and head at a time, over an explicit list of visible slots."""
    num_lanes, num_queries, num_heads, _ = query.shape
    out = torch.zeros(num_lanes, num_queries, num_heads, values.shape[-1])
    for lane in range(num_lanes):
        base = int(segment.base_B[lane])
        for i in range(num_queries):
            position = base + int(segment.depth_N[i])
            visible = [(slot, slot) for slot in range(base)]
            visible += [(base + j, base + int(segment.depth_N[j])) for j in range(num_queries) if segment.ancestor_mask_NN[i, j]]
            if params.window is not None:
                visible = [(slot, key_position) for slot, key_position in visible if position - key_position < params.window]
            rows = segment.context_slots_BC[lane, [slot for slot, _ in visible]]
            for head in range(num_heads):
                kv_head = head // (num_heads // keys.shape[1])
                scores = keys[rows, kv_head] @ query[lane, i, head] * params.scaling
                if params.softcap is not None:
                    scores = params.softcap * torch.tanh(scores / params.softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if params.sinks_H is None else params.sinks_H[head].exp())
                out[lane, i, head] = (weights / total) @ values[rows, kv_head]
    return out


@settings(deadline=None, max_examples=60)
@given(
    bases=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (7, 7)]),
    dims=st.sampled_from([(8, 8), (6, 10)]),
    tree=st.sampled_from([TREE, TreeTopology.chain(4), TreeTopology.chain(0)]),
    window=st.sampled_from([None, 1, 3, 17]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
)
def test_equals_plain_attention(bases, heads, dims, tree, window, softcap, has_sinks):
    device_tree = DeviceTree.create(tree, torch.device("cpu"))
    case = make_case(
        bases=bases,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        key_dim=dims[0],
        value_dim=dims[1],
        tree=device_tree,
        seed=len(bases),
    )
    sinks = torch.linspace(-1, 1, heads[0]) if has_sinks else None
    params = AttentionParams(scaling=1 / math.sqrt(dims[0]), window=window, softcap=softcap, sinks_H=sinks)
    expected = plain_attention(*case, params)
    torch.testing.assert_close(TorchAttention().attend(*case, params), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attend_reference(*case, params), expected, rtol=1e-4, atol=1e-5)


def test_slots_behind_the_tree_are_not_seen():
    """Garbage in reserved slots that this step did not write changes nothing."""
    tree = DeviceTree.create(TREE, torch.device("cpu"))
    query, keys, values, segment = make_case(bases=[9], num_heads=2, num_kv_heads=1, key_dim=8, value_dim=8, tree=tree)
    params = AttentionParams(scaling=1.0)
    before = TorchAttention().attend(query, keys, values, segment, params)
    unseen = segment.context_slots_BC[0, 9 + tree.num_nodes :]
    keys[unseen], values[unseen] = 1e4, 1e4
    assert torch.equal(TorchAttention().attend(query, keys, values, segment, params), before)


def test_siblings_share_a_position_and_a_window():
    """A window of 1 shows a query itself only, wherever its slot lies."""
    tree = DeviceTree.create(TREE, torch.device("cpu"))
    query, keys, values, segment = make_case(bases=[5], num_heads=1, num_kv_heads=1, key_dim=4, value_dim=4, tree=tree)
    out = TorchAttention().attend(query, keys, values, segment, AttentionParams(scaling=1.0, window=1))
    own = segment.context_slots_BC[0, 5 : 5 + tree.num_nodes]
    torch.testing.assert_close(out[0, :, 0], values[own, 0])


@pytest.mark.cuda
def test_cuda_equals_the_reference():
    tree = DeviceTree.create(TREE, torch.device("cpu"))
    query, keys, values, segment = make_case(bases=[33, 2], num_heads=8, num_kv_heads=2, key_dim=64, value_dim=64, tree=tree)
    params = AttentionParams(scaling=0.125, window=20)
    expected = attend_reference(query, keys, values, segment, params)
    on_cuda = Segment(0, *(x.cuda() for x in (segment.base_B, segment.depth_N, segment.ancestor_mask_NN, segment.context_slots_BC)))
    actual = TorchAttention().attend(query.cuda(), keys.cuda(), values.cuda(), on_cuda, params)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-4)
