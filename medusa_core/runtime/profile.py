"""Measures what a step costs on this machine, for the controller that picks the tree's size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from medusa_core.attention.context import PagedContext
from medusa_core.attention.segments import AttentionBackend, Segment
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.runner import DeviceModel
from medusa_core.sampling.sampler import SamplingRows
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.verify import walk_tree

_NUM_REPEATS = 3
_WARM_UP_REPEATS = 1


@torch.inference_mode()
def measure_row_costs(
    model: DeviceModel, kv_store: KVStore, attention: AttentionBackend, row_counts: Sequence[int], *, progress: bool
) -> dict[int, float]:
    """Seconds of one step by number of rows: forward, projection, verification. Draft cost is measured apart.

    Rows attend to the spare slot, so that nothing in the cache changes.
    """
    counts = tqdm(row_counts, desc="measuring step costs", disable=not progress)
    return {
        num_rows: _median_seconds(model.device, partial(_run_rows, model, kv_store, attention, num_rows)) for num_rows in counts
    }


@torch.inference_mode()
def measure_draft_costs(model: DeviceModel, hidden_PE: Tensor, num_candidates: int, lane_counts: Sequence[int]) -> dict[int, float]:
    """Seconds to draft, by number of lanes; empty without heads."""
    draft = model.draft
    if draft is None:
        return {}
    return {n: _median_seconds(model.device, partial(draft, hidden_PE[:n], num_candidates)) for n in lane_counts}


def _run_rows(model: DeviceModel, kv_store: KVStore, attention: AttentionBackend, num_rows: int) -> None:
    device = model.device
    tree = DeviceTree.causal(num_rows, device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.full((1, num_rows), kv_store.spare_slot, dtype=torch.int64, device=device)
    segment = Segment(0, zero, tree.depth_N, tree.ancestor_mask_NN, slots)
    context = PagedContext.create(kv_store, [segment], attention)
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
    # All at position 0: there may be more rows than the context has positions.
    logits = model.project(model.forward(tokens, torch.zeros_like(tokens), context))
    walk_tree(logits.unsqueeze(0), tokens.unsqueeze(0), tree, _greedy_row(device), zero)


def _greedy_row(device: torch.device) -> SamplingRows:
    zero = torch.zeros(1, device=device)
    integer = torch.zeros(1, dtype=torch.int64, device=device)
    return SamplingRows(
        temperature_R=zero,
        top_k_R=integer,
        top_p_R=zero + 1,
        min_p_R=zero,
        min_tokens_R=integer,
        stop_ids_RW=integer.unsqueeze(1) - 1,
        key_R=integer,
        is_all_greedy=True,
        has_top_k=False,
        has_top_p=False,
        has_min_p=False,
        has_min_tokens=False,
    )


def _median_seconds(device: torch.device, run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_WARM_UP_REPEATS + _NUM_REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[_WARM_UP_REPEATS:])[_NUM_REPEATS // 2]
