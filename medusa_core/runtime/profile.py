"""Measures what a step costs on this machine, for the controller that picks the tree's size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from medusa_core.attention.context import PagedContext
from medusa_core.attention.segments import AttentionBackend, Segment
from medusa_core.params import SamplingParams
from medusa_core.plan import DecodeGroup, LaneJoin, StepPlan
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.runner import DeviceModel, ModelRunner
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.tree.topology import TreeTopology

_NUM_REPEATS = 3
_WARM_UP_REPEATS = 1
# Size of the tree whose cost beyond its rows is measured; the heads, the walk and the commit hardly depend on it.
_OVERHEAD_NODES = 4


@torch.inference_mode()
def measure_row_costs(
    model: DeviceModel, kv_store: KVStore, attention: AttentionBackend, row_counts: Sequence[int], *, progress: bool
) -> dict[int, float]:
    """Seconds of the forward pass, the projection and the arg max, by number of rows.

    Rows attend to the spare slot, so that nothing in the cache changes.
    """
    counts = tqdm(row_counts, desc="measuring step costs", disable=not progress)
    return {num_rows: _least_seconds(model.device, partial(_run_rows, model, kv_store, attention, num_rows)) for num_rows in counts}


def measure_tree_overhead(
    runner: ModelRunner,
    topology: TreeTopology,
    row_costs: Callable[[int], float],
    lane_counts: Sequence[int],
    *,
    block_ids: Sequence[int],
    max_total_tokens: int,
    device: torch.device,
) -> dict[int, float]:
    """Seconds that a tree step takes beyond a plain step and beyond its additional rows, by number of lanes: the heads, the walk
    down the tree, the commit.

    Runs real steps on lanes that all write to `block_ids`, which must hold no request's tokens, and leaves the lanes free.

    Args:
        row_costs: seconds by number of rows, as `measure_row_costs` found them.
    """
    num_nodes = min(_OVERHEAD_NODES, topology.num_nodes)
    overhead = {}
    for num_lanes in lane_counts:
        lanes = list(range(num_lanes))
        joins = [_join(lane, block_ids, max_total_tokens) for lane in lanes]
        seconds = {}
        for size in (1, num_nodes):
            runner.submit(StepPlan(step_id=0, joins=joins)).result()
            plan = StepPlan(step_id=0, decode_groups=[DecodeGroup(lanes=lanes, num_nodes=size)])
            seconds[size] = _least_seconds(device, partial(_run_plan, runner, plan))
            runner.submit(StepPlan(step_id=0, leaves=lanes)).result()
        more_rows = row_costs(num_nodes * num_lanes) - row_costs(num_lanes)
        overhead[num_lanes] = max(seconds[num_nodes] - seconds[1] - more_rows, 0.0)
    return overhead


def overhead_slots(topology: TreeTopology) -> int:
    """Slots a lane of `measure_tree_overhead` may write to."""
    return 1 + (_WARM_UP_REPEATS + _NUM_REPEATS) * (topology.max_depth + 1) + topology.num_nodes


def _join(lane: int, block_ids: Sequence[int], max_total_tokens: int) -> LaneJoin:
    return LaneJoin(
        lane=lane,
        uid=lane,
        token_ids=[0],
        num_prompt_tokens=1,
        num_computed_tokens=0,
        max_total_tokens=max_total_tokens,
        noise_key=0,
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        block_ids=list(block_ids),
    )


def _run_plan(runner: ModelRunner, plan: StepPlan) -> None:
    runner.submit(plan).result()


def _run_rows(model: DeviceModel, kv_store: KVStore, attention: AttentionBackend, num_rows: int) -> None:
    device = model.device
    tree = DeviceTree.causal(num_rows, device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.full((1, num_rows), kv_store.spare_slot, dtype=torch.int64, device=device)
    segment = Segment(0, zero, tree.depth_N, tree.ancestor_mask_NN, slots)
    context = PagedContext.create(kv_store, [segment], attention)
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
    # All at position 0: there may be more rows than the context has positions.
    model.project(model.forward(tokens, torch.zeros_like(tokens), context)).argmax(dim=-1)


def _least_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Of a few runs the fastest: what else the machine does can only add."""
    seconds = []
    for _ in range(_WARM_UP_REPEATS + _NUM_REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[_WARM_UP_REPEATS:])
