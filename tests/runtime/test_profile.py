"""Costs are measured for every size asked for, and measuring leaves the cache as it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from medusa_core.attention.torch_backend import TorchAttention
from medusa_core.model.attention_hook import forward_hidden, install_attention, probe_layer_shapes
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.profile import measure_draft_costs, measure_row_costs
from medusa_core.runtime.runner import DeviceModel
from tests.equivalence.models import tiny_model


@pytest.fixture
def model() -> DeviceModel:
    loaded = tiny_model("llama")
    install_attention(loaded.model)
    return DeviceModel(
        forward=partial(forward_hidden, loaded.model),
        project=loaded.project,
        draft=lambda hidden_BE, k: torch.zeros(hidden_BE.shape[0], 2, k, dtype=torch.int64),
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


def test_draft_costs_by_lanes(model: DeviceModel):
    hidden = torch.zeros(4, 48, device=model.device)
    assert list(measure_draft_costs(model, hidden, 3, [1, 4])) == [1, 4]


def test_without_heads_there_is_no_draft_cost(model: DeviceModel):
    without = DeviceModel(
        forward=model.forward, project=model.project, draft=None, eos_token_ids=model.eos_token_ids, device=model.device
    )
    assert measure_draft_costs(without, torch.zeros(4, 48), 3, [1, 4]) == {}
