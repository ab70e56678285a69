"""Cache kernels against plain indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from medusa_core.kernels.kv_cache import commit_path, write_kv
from tests import options

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 64, 64), (5, 1, 80, 80), (33, 3, 8, 24), (2, 40, 128, 64)])
def test_rows_reach_their_slots_and_nothing_else_changes(shape, dtype):
    num_rows, num_heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)
    # keys and values as views of one product, the way a fused layer has them
    product = torch.randn(num_rows, num_heads * (key_dim + value_dim) + 3, generator=generator).to(dtype).to(options.device)
    key = product[:, 3 : 3 + num_heads * key_dim].view(num_rows, num_heads, key_dim)
    value = product[:, 3 + num_heads * key_dim :].view(num_rows, num_heads, value_dim)
    key_slots = torch.randn(50, num_heads, key_dim, generator=generator).to(dtype).to(options.device)
    value_slots = torch.randn(50, num_heads, value_dim, generator=generator).to(dtype).to(options.device)
    slots = torch.randperm(50, generator=generator)[:num_rows].to(options.device)
    expected_keys, expected_values = key_slots.index_copy(0, slots, key), value_slots.index_copy(0, slots, value)
    write_kv(key, value, key_slots, value_slots, slots)
    assert torch.equal(key_slots, expected_keys)
    assert torch.equal(value_slots, expected_values)


def test_heads_may_be_apart_and_negative_slots_are_skipped():
    key = torch.arange(2 * 3 * 4.0, device=options.device).view(3, 2, 4).transpose(0, 1)
    key_slots, value_slots = torch.zeros(4, 3, 4, device=options.device), torch.zeros(4, 3, 4, device=options.device)
    write_kv(key, -key, key_slots, value_slots, torch.tensor([-1, 2], device=options.device))
    expected = torch.zeros(4, 3, 4, device=options.device)
    expected[2] = key[1]
    assert torch.equal(key_slots, expected)
    assert torch.equal(value_slots, -expected)


def make_store(num_slots, dtype=torch.float32, num_layers=3, num_heads=2, key_dim=8, value_dim=12):
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(num_layers, num_slots, num_heads, key_dim, generator=generator).to(dtype)
    value = torch.randn(num_layers, num_slots, num_heads, value_dim, generator=generator).to(dtype)
    return key.to(options.device), value.to(options.device)


def check_commit(source, target, dtype=torch.float32, **shape):
    source, target = torch.tensor(source), torch.tensor(target)
    key, value = make_store(int(max(source.max(), target.max())) + 2, dtype, **shape)
    expected = (key.clone(), value.clone())
    is_moved = (source >= 0) & (target >= 0) & (source != target)
    for buffer in expected:
        buffer[:, target[is_moved]] = buffer[:, source[is_moved]]
    commit_path(key, value, source.to(options.device), target.to(options.device))
    assert torch.equal(key, expected[0])
    assert torch.equal(value, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_of_several_lanes_move_in_every_layer(dtype):
    check_commit([[10, 13, 16, 20, -1], [30, 33, 31, -1, -1]], [[10, 11, 12, 13, 14], [30, 31, 32, 33, -1]], dtype)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        # each source is another entry's target: any order of single moves would lose one
        ([1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5]),
        ([5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]),
        ([5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]),
        (list(range(1, 65)), list(range(64))),
        (list(range(64)), list(range(1, 65))),
    ],
)
def test_sources_and_targets_may_overlap(source, target):
    check_commit([source], [target], num_heads=4, key_dim=64, value_dim=80)


def test_one_slot_many_elements():
    check_commit([[3]], [[1]], num_heads=3, key_dim=2000, value_dim=1)


def test_nothing_moves():
    check_commit([[4, -1, 2]], [[4, 5, -1]])


@settings(deadline=None, max_examples=25)
@given(data=st.data(), num_lanes=st.integers(1, 3), path_len=st.integers(1, 9))
def test_random_moves(data, num_lanes, path_len):
    source, target = [], []
    for lane in range(num_lanes):
        # a lane owns 12 slots
        slots = st.lists(st.integers(12 * lane, 12 * lane + 11), min_size=path_len, max_size=path_len)
        source.append([slot if data.draw(st.booleans()) else -1 for slot in data.draw(slots)])
        target.append(data.draw(st.permutations(range(12 * lane, 12 * lane + 12)))[:path_len])
    check_commit(source, target)


def test_a_path_that_is_too_long_is_refused():
    key, value = make_store(70)
    slots = torch.zeros(1, 65, dtype=torch.int64, device=options.device)
    with pytest.raises(ValueError, match="65 slots"):
        commit_path(key, value, slots, slots)
