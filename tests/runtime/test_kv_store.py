"""Slots move as if all were read before any is written."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_core.runtime.kv_store import KVStore, slot_bytes

SHAPES = [(2, 4, 4), (1, 8, 6), (2, 4, 4)]


def filled_store(num_blocks: int = 4, block_size: int = 4) -> KVStore:
    store = KVStore(SHAPES, num_blocks, block_size, torch.float32, torch.device("cpu"))
    for layer_idx in range(len(SHAPES)):
        for tensor in store.layer(layer_idx):
            slots = torch.arange(tensor.shape[0], dtype=torch.float32).view(-1, 1, 1)
            tensor.copy_(slots.expand_as(tensor) + 100 * layer_idx)
    return store


def slot_values(store: KVStore, layer_idx: int) -> list[list[float]]:
    return [tensor[:16, 0, 0].tolist() for tensor in store.layer(layer_idx)]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=8), st.permutations(range(16)))
def test_overlapping_moves_read_everything_first(sources, targets):
    store = filled_store()
    targets = targets[: len(sources)]
    store.move(torch.tensor(sources), torch.tensor(targets))
    for layer_idx in range(len(SHAPES)):
        expected = [float(slot + 100 * layer_idx) for slot in range(16)]
        for source, target in zip(sources, targets, strict=True):
            expected[target] = float(source + 100 * layer_idx)
        assert slot_values(store, layer_idx) == [expected, expected]


def test_a_shift_by_one_does_not_smear():
    """The order of an accepted path: node slots 2, 3, 4 to 1, 2, 3."""
    store = filled_store()
    store.move(torch.tensor([2, 3, 4]), torch.tensor([1, 2, 3]))
    assert slot_values(store, 0)[0][:6] == [0, 2, 3, 4, 4, 5]


def test_context_slots_follow_the_block_table_and_end_in_the_spare_slot():
    store = filled_store()
    slots = store.context_slots(torch.tensor([[2, 0], [1, -1]]))
    assert slots.tolist() == [[8, 9, 10, 11, 0, 1, 2, 3], [4, 5, 6, 7, 16, 16, 16, 16]]


def test_slot_bytes_adds_up_all_layers():
    assert slot_bytes(SHAPES, torch.float16) == 2 * (2 * 8 + 1 * 14 + 2 * 8)
