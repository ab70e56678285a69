"""Which runner an engine gets, the captured one or its eager twin, and what its steps cost."""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from medusa_core.attention.context import LayerShape
from medusa_core.attention.segments import AttentionBackend
from medusa_core.config import NODE_BUCKETS, EngineConfig
from medusa_core.errors import ConfigError
from medusa_core.grammar.lanes import GrammarLanes
from medusa_core.model.attention_hook import forward_hidden
from medusa_core.model.heads import DraftHeads
from medusa_core.model.loader import LoadedModel
from medusa_core.runtime.buckets import decode_buckets
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.lanes import LaneState
from medusa_core.runtime.profile import measure_row_costs, measure_tree_overhead, overhead_slots
from medusa_core.runtime.runner import DeviceModel, ModelRunner
from medusa_core.runtime.self_check import AttentionReference
from medusa_core.scheduler.costs import CapturedCosts, CostCurve, PackedCosts, StepCosts
from medusa_core.speculation.drafter import Drafter
from medusa_core.tree.topology import TreeTopology

if TYPE_CHECKING:
    from medusa_core.runtime.graph_runner import GraphRunner

logger = logging.getLogger(__name__)

_LARGE_ROW_COUNTS = (128, 256, 512, 1024)
# Drafting is timed at every third number of lanes that there are graphs for.
_DRAFT_STRIDE = 3


def is_captured(config: EngineConfig, device: torch.device) -> bool:
    """Whether steps run on kernels. Raises ConfigError where that was asked for and cannot be."""
    mode = config.execution.mode
    if mode == "eager" or (mode == "auto" and device.type != "cuda"):
        return False
    try:
        # Imported here: without a GPU there may be no triton.
        from medusa_core.kernels.support import is_interpreted, run_a_kernel

        if device.type != "cuda" and not is_interpreted():
            raise ConfigError(f'mode is "captured", but {device} is no CUDA device.', hint='Use "auto".')
        run_a_kernel(device)
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"Triton cannot compile kernels for {device}: {error}.",
            hint="It needs a C compiler such as gcc, and Python's headers. --enforce-eager does without, many times slower.",
        ) from error
    return True


def fuse(loaded: LoadedModel, heads: DraftHeads | None) -> None:
    """Swap what can be fused, in place: decoder layers, norm, rotary embedding, output projections."""
    from medusa_core.model.fusion import fuse_model, fuse_projection

    fuse_model(loaded.model, loaded.max_model_len)
    fuse_projection(loaded.project)
    draft_projection = getattr(heads, "draft_projection", None)
    if draft_projection is not None:
        fuse_projection(draft_projection)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerParts:
    """What both runners are made of. node_sizes: tree sizes that plans may name."""

    config: EngineConfig
    loaded: LoadedModel
    drafter: Drafter | None
    layer_shapes: list[LayerShape]
    topology: TreeTopology
    node_sizes: tuple[int, ...]
    kv_store: KVStore
    lanes: LaneState
    grammars: GrammarLanes
    attention: AttentionBackend
    reference: AttentionReference

    @property
    def num_query_heads(self) -> int:
        num_heads = getattr(self.loaded.model.config.get_text_config(), "num_attention_heads", None)
        return int(num_heads or max(num_kv_heads for num_kv_heads, _, _ in self.layer_shapes))

    @property
    def device_model(self) -> DeviceModel:
        loaded = self.loaded
        return DeviceModel(
            forward=partial(forward_hidden, loaded.model),
            project=loaded.project,
            drafter=self.drafter,
            eos_token_ids=loaded.eos_token_ids,
            device=loaded.device,
            best_token=loaded.project.best_token,
        )


def eager_runner(parts: RunnerParts) -> ModelRunner:
    """The plain torch twin."""
    return ModelRunner(
        model=parts.device_model,
        topology=parts.topology,
        kv_store=parts.kv_store,
        lanes=parts.lanes,
        attention=parts.attention,
        grammars=parts.grammars,
    )


def captured_runner(parts: RunnerParts, *, progress: bool) -> GraphRunner:
    """Checked and captured.

    Raises UnsupportedModelError if the kernels do not compute what the model does, ConfigError if the device has no room for one.
    """
    from medusa_core.kernels.support import KernelError

    try:
        return _captured_runner(parts, progress=progress)
    except KernelError as error:
        raise ConfigError(
            f"A kernel that this model needs does not run on {parts.loaded.device}: {error}",
            hint="--enforce-eager does without, many times slower.",
        ) from error


def _captured_runner(parts: RunnerParts, *, progress: bool) -> GraphRunner:
    from medusa_core.attention.kernel_context import BlockTables, tree_workspace
    from medusa_core.kernels.attention import chunk_tile_rows
    from medusa_core.kernels.support import can_overlap_launches
    from medusa_core.runtime.device_step import StepParts, hidden_stores
    from medusa_core.runtime.graph_runner import GraphRunner
    from medusa_core.runtime.kernel_check import check_kernels

    loaded, lanes, scheduler = parts.loaded, parts.lanes, parts.config.scheduler
    num_heads = parts.num_query_heads
    buckets = decode_buckets(lanes.num_lanes, parts.node_sizes, scheduler.max_step_rows)
    # the check's own tree is a step of one lane and a few nodes
    workspace = tree_workspace([(1, NODE_BUCKETS[-1]), *buckets], num_heads, parts.layer_shapes, loaded.device)
    tile_rows = chunk_tile_rows(num_heads, min(num_kv_heads for num_kv_heads, _, _ in parts.layer_shapes))
    check_kernels(loaded.model, parts.reference, parts.layer_shapes, tile_rows, workspace)
    tables = BlockTables(table_PX=lanes.block_table_PX, block_size=parts.kv_store.block_size, spare_slot=parts.kv_store.spare_slot)
    step_parts = StepParts(
        model=parts.device_model,
        lanes=lanes,
        kv_store=parts.kv_store,
        tables=tables,
        workspace=workspace,
        tile_rows=tile_rows,
        **hidden_stores(lanes, parts.topology.max_depth + 1, scheduler.max_step_tokens),
        use_pdl=can_overlap_launches(loaded.device),
    )
    runner = GraphRunner(
        step_parts,
        parts.topology,
        parts.grammars,
        node_sizes=parts.node_sizes,
        max_rows=scheduler.max_step_rows,
        max_chunk_rows=scheduler.max_step_tokens,
    )
    runner.capture(progress=progress)
    logger.info("Captured %d steps.", runner.num_graphs)
    return runner


def captured_costs(runner: GraphRunner) -> StepCosts:
    """Measured on the graphs themselves."""
    decode, prefill, draft = runner.measure_decode(), runner.measure_prefill(), {}
    for num_nodes in sorted({nodes for _, nodes in decode}):
        _log_milliseconds(
            f"{num_nodes}-node step", "lanes", {lanes: seconds for (lanes, nodes), seconds in decode.items() if nodes == num_nodes}
        )
        if num_nodes > 1:
            # Of interest to people alone, and a capture for each: what lies between is interpolated.
            lane_counts = sorted(lanes for lanes, nodes in decode if nodes == num_nodes)
            for lanes in {*lane_counts[::_DRAFT_STRIDE], lane_counts[-1]}:
                draft[lanes, num_nodes] = runner.draft_seconds(lanes, num_nodes)
    _log_milliseconds("prefill", "rows", prefill)
    return CapturedCosts(decode, prefill, draft)


def eager_costs(parts: RunnerParts, runner: ModelRunner, *, progress: bool) -> StepCosts:
    """Measured through the runner, on blocks that hold nothing yet."""
    model, kv_store = parts.device_model, parts.kv_store
    row_counts = sorted([2, *NODE_BUCKETS, *(_LARGE_ROW_COUNTS if model.device.type == "cuda" else ())])
    rows = measure_row_costs(model, kv_store, parts.attention, row_counts, progress=progress)
    forward = CostCurve.from_points(rows.items())
    num_blocks = min(-(-overhead_slots(parts.topology) // kv_store.block_size), kv_store.num_blocks)
    overhead = measure_tree_overhead(
        runner,
        parts.topology,
        forward.seconds,
        [n for n in (1, 4, 16) if n <= parts.lanes.num_lanes],
        block_ids=range(num_blocks),
        max_total_tokens=parts.loaded.max_model_len,
        device=model.device,
    )
    _log_milliseconds("step", "rows", rows)
    _log_milliseconds("tree", "lanes", overhead)
    return PackedCosts(forward=forward, draft=CostCurve.from_points(overhead.items()))


def _log_milliseconds(what: str, unit: str, costs: dict[int, float]) -> None:
    logger.info("Measured %s cost by %s, ms: %s.", what, unit, ", ".join(f"{count}: {1e3 * s:.2f}" for count, s in costs.items()))
