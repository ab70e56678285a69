"""Costs are measured for every size asked for, and measuring leaves the cache as it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from medusa_core.attention.torch_backend import TorchAttention
from medusa_core.model.attention_hook import forward_hidden, install_attention, probe_layer_shapes
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.lanes import LaneState
from medusa_core.runtime.profile import measure_row_costs, measure_tree_overhead, overhead_slots
from medusa_core.runtime.runner import DeviceModel, ModelRunner
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.tree.topology import TreeTopology
from tests.equivalence.models import VOCAB_SIZE, tiny_model
from tests.grammars import no_grammars


class ConstantDrafter:
    """Always the same token."""

    def lists_of(self, tree: DeviceTree) -> Tensor:
        return tree.depth_N - 1

    def __call__(self, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree) -> Tensor:
        return hidden_BE.new_zeros(hidden_BE.shape[0], tree.max_depth, tree.max_rank + 1, dtype=torch.int64)


@pytest.fixture
def model() -> DeviceModel:
    loaded = tiny_model("llama")
    install_attention(loaded.model)
    return DeviceModel(
        forward=partial(forward_hidden, loaded.model),
        project=loaded.project,
        drafter=ConstantDrafter(),
        eos_token_ids=loaded.eos_token_ids,
        device=loaded.device,
    )


def test_row_costs_leave_the_cache_alone(model: DeviceModel):
    shapes = probe_layer_shapes(tiny_model("llama").model)
    store = KVStore(shapes, 4, 8, torch.float32, model.device)
    for layer_idx in range(len(shapes)):
        for slots in store.layer(layer_idx):
            slots.fill_(7.0)
    costs = measure_row_costs(model, store, TorchAttention(), [1, 3, 40], progress=False)
    assert list(costs) == [1, 3, 40]
    assert all(seconds > 0 for seconds in costs.values())
    for layer_idx in range(len(shapes)):
        for slots in store.layer(layer_idx):
            assert bool((slots[: store.spare_slot] == 7.0).all())


def test_tree_overhead_by_lanes_leaves_the_lanes_free(model: DeviceModel):
    topology = TreeTopology.chain(2)
    store = KVStore(probe_layer_shapes(tiny_model("llama").model), 8, 8, torch.float32, model.device)
    lanes = LaneState(4, 256, 8, 48, torch.float32, model.device, vocab_size=VOCAB_SIZE, max_stop_ids=8)
    runner = ModelRunner(
        model=model, topology=topology, kv_store=store, lanes=lanes, attention=TorchAttention(), grammars=no_grammars()
    )
    num_blocks = -(-overhead_slots(topology) // 8)
    overhead = measure_tree_overhead(
        runner, topology, lambda num_rows: 0.0, [1, 4], block_ids=range(num_blocks), max_total_tokens=256, device=model.device
    )
    assert list(overhead) == [1, 4]
    assert all(seconds >= 0 for seconds in overhead.values())
    assert lanes.host == {}
