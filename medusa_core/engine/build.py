"""Puts an engine together from its options: model, heads, cache, runner, scheduler."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch

from medusa_core.attention.context import LayerShape
from medusa_core.attention.torch_backend import TorchAttention
from medusa_core.cache.manager import CacheManager
from medusa_core.config import EngineConfig, ModelConfig
from medusa_core.engine.core import EngineCore
from medusa_core.engine.grammars import grammar_compiler
from medusa_core.engine.runners import RunnerParts, captured_costs, captured_runner, eager_costs, eager_runner, fuse, is_captured
from medusa_core.engine.tree_choice import choose_controller, choose_tree, offered_sizes
from medusa_core.errors import ConfigError
from medusa_core.grammar.lanes import GrammarLanes
from medusa_core.model.attention_hook import install_attention, probe_layer_shapes
from medusa_core.model.calibration import Calibration, find_calibration, load_calibration
from medusa_core.model.checkpoint import find_heads, load_heads
from medusa_core.model.heads import DraftHeads
from medusa_core.model.loader import LoadedModel, load_model
from medusa_core.model.packed_linear import can_pack, pack_linears
from medusa_core.model.probe import probe_heads, probe_token_ids
from medusa_core.model.sequential_heads import SequentialHeads
from medusa_core.outputs import EngineInfo
from medusa_core.params import MAX_STOP_TOKEN_IDS
from medusa_core.plan import Runner
from medusa_core.runtime.buckets import max_bucket_rows
from medusa_core.runtime.kv_store import KVStore, slot_bytes
from medusa_core.runtime.lanes import LaneState
from medusa_core.runtime.memory import choose_num_blocks, free_memory_bytes
from medusa_core.runtime.penalty_state import PenaltyState
from medusa_core.runtime.self_check import attention_reference, check_attention
from medusa_core.sampling.logprobs import workspace_bytes as logprob_bytes
from medusa_core.sampling.token_mask import mask_bytes
from medusa_core.scheduler.scheduler import Scheduler
from medusa_core.speculation.drafter import make_drafter
from medusa_core.tree.presets import load_tree
from medusa_core.tree.topology import TreeTopology

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CalibratedHeads:
    """Heads and, if they were measured, what came of it."""

    heads: DraftHeads
    calibration: Calibration | None = None


def build_engine(config: EngineConfig, *, progress: bool = True) -> EngineCore:
    """Load everything `config` names and wire it up. Raises ConfigError or ModelError."""
    _check_speculation(config)
    loaded = load_model(config.model, progress=progress)
    _make_current(loaded.device)
    heads = _find_heads(config.model, loaded, progress=progress) if config.speculation.enabled else None
    if can_pack(loaded.device, loaded.dtype):
        if heads and isinstance(heads.heads, SequentialHeads):
            heads.heads.use_int8()
        # After the heads, which may have copied rows of lm_head; before the self-check, which then covers the packed layers.
        pack_linears([loaded.model, loaded.project, *([heads.heads] if heads else [])])
    return assemble_engine(config, loaded, heads, progress=progress)


def assemble_engine(
    config: EngineConfig, loaded: LoadedModel, heads: CalibratedHeads | None, *, progress: bool = False
) -> EngineCore:
    """The engine over a model that is in memory already. Raises ConfigError, or UnsupportedModelError if the self-check fails."""
    install_attention(loaded.model)
    attention = TorchAttention()
    layer_shapes = probe_layer_shapes(loaded.model)
    reference = attention_reference(loaded.model, loaded.project, loaded.max_model_len)
    check_attention(loaded.model, reference, layer_shapes, attention, loaded.max_model_len)

    num_heads = heads.heads.num_heads if heads else 0
    calibration = heads.calibration if heads else None
    tree = choose_tree(config.speculation, num_heads, calibration)
    topology = tree.topology
    if heads:
        _check_ranks(topology, heads.heads.draft_vocab_size or loaded.vocab_size)
    captured = is_captured(config, loaded.device)
    if captured:
        fuse(loaded, heads.heads if heads else None)
    # may keep weights of its own, so before the cache takes what memory is left
    drafter = make_drafter(heads.heads, loaded, has_kernels=captured) if heads else None
    scheduler_config = config.scheduler
    num_lanes = scheduler_config.max_num_seqs
    node_sizes = offered_sizes(config.speculation, topology)
    # the last tree of a request can reach beyond the last token it may emit
    max_blocks = -(-(loaded.max_model_len + topology.num_nodes) // config.cache.block_size)
    max_rows = (
        max_bucket_rows(num_lanes, node_sizes, scheduler_config.max_step_rows) if captured else scheduler_config.max_step_rows
    )
    num_blocks = choose_num_blocks(
        config.cache,
        free_bytes=free_memory_bytes(loaded.device),
        # eager: as the projection writes them, and the float32 copy that tokens are drawn from; captured: float32 in the graphs'
        # memory, and in that of their warm-up
        logits_bytes=max_rows * loaded.vocab_size * ((4 if captured else loaded.dtype.itemsize) + torch.float32.itemsize)
        + PenaltyState.num_bytes(num_lanes, loaded.project.num_tokens)
        + mask_bytes(max_rows, loaded.project.num_tokens)
        + logprob_bytes(loaded.project.num_tokens),
        slot_bytes=slot_bytes(layer_shapes, loaded.dtype),
        max_blocks_per_lane=max_blocks,
        num_lanes=num_lanes,
        device_type=loaded.device.type,
    )
    compiler = grammar_compiler(loaded, trust_remote_code=config.model.trust_remote_code)
    parts = RunnerParts(
        config=config,
        loaded=loaded,
        drafter=drafter,
        layer_shapes=layer_shapes,
        topology=topology,
        node_sizes=node_sizes,
        kv_store=_allocate_kv_store(layer_shapes, num_blocks, config.cache.block_size, loaded),
        lanes=LaneState(
            num_lanes,
            loaded.max_model_len,
            max_blocks,
            loaded.hidden_size,
            loaded.dtype,
            loaded.device,
            max_stop_ids=MAX_STOP_TOKEN_IDS + len(loaded.eos_token_ids),
            vocab_size=loaded.project.num_tokens,
        ),
        grammars=GrammarLanes(compiler, num_tokens=loaded.project.num_tokens, eos_token_ids=loaded.eos_token_ids),
        attention=attention,
        reference=reference,
    )
    runner: Runner
    if captured:
        runner = graph_runner = captured_runner(parts, progress=progress)
        measure_costs = partial(captured_costs, graph_runner)
    else:
        runner = eager = eager_runner(parts)
        measure_costs = partial(eager_costs, parts, eager, progress=progress)
    controller = choose_controller(
        config.speculation, tree, max_step_rows=scheduler_config.max_step_rows, measure_costs=measure_costs
    )
    cache = CacheManager(
        num_blocks=num_blocks, block_size=config.cache.block_size, enable_prefix_cache=config.cache.enable_prefix_cache
    )
    scheduler = Scheduler(
        scheduler_config,
        cache,
        controller,
        max_depth=topology.max_depth,
        max_model_len=loaded.max_model_len,
        topology=topology,
    )
    info = _describe(config, loaded, topology, tree.name, num_heads=num_heads, num_blocks=num_blocks, node_sizes=node_sizes)
    in_flight = scheduler_config.max_steps_in_flight
    if in_flight is None:
        in_flight = int(captured)
    return EngineCore(scheduler, runner, info, max_steps_in_flight=in_flight, grammars=compiler)


def _make_current(device: torch.device) -> None:
    """Kernels, streams and events go to the current device of their thread: for cuda:1, the engine's thread must have that one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _find_heads(config: ModelConfig, loaded: LoadedModel, *, progress: bool) -> CalibratedHeads | None:
    """The heads `config` asks for, probed on a short text; None, with a warning, where there are none."""
    source = find_heads(config, loaded, progress=progress)
    if source is None:
        if config.heads != "none":
            logger.warning("No Medusa heads found for %s: serving without them. Name some with --heads.", loaded.name)
        return None
    heads = load_heads(source, loaded)
    calibration_path = find_calibration(source)
    calibration = load_calibration(calibration_path) if calibration_path else None
    probe_heads(heads, loaded, probe_token_ids(loaded, trust_remote_code=config.trust_remote_code))
    return CalibratedHeads(heads, calibration)


def _check_speculation(config: EngineConfig) -> None:
    """What can be told before the weights are loaded: a misspelt tree, or one that nothing could fill. Raises ConfigError."""
    speculation = config.speculation
    needs_heads = speculation.tree != "auto" and load_tree(speculation.tree).head_depth > 0
    if config.model.heads == "none" and speculation.enabled:
        has_size = speculation.tree_size not in ("auto", 1) and not speculation.prompt_lookup
        for name, value, is_unused in (
            ("tree", speculation.tree, not needs_heads),
            ("tree_size", speculation.tree_size, not has_size),
        ):
            if not is_unused:
                raise ConfigError(f'{name} is {value!r}, but heads is "none".', hint="Leave one of them out.")


def _check_ranks(topology: TreeTopology, draft_vocab_size: int) -> None:
    """Raises ConfigError for a tree that asks a head for more candidates than there are tokens."""
    if topology.max_rank >= draft_vocab_size:
        raise ConfigError(
            f"The tree has rank {topology.max_rank}, but the heads choose among {draft_vocab_size} tokens.",
            hint="Ranks start at 0; use lower ones.",
        )


def _allocate_kv_store(layer_shapes: list[LayerShape], num_blocks: int, block_size: int, loaded: LoadedModel) -> KVStore:
    """Raises ConfigError where the memory is not there, which only a number of blocks set by hand can cause."""
    try:
        return KVStore(layer_shapes, num_blocks, block_size, loaded.dtype, loaded.device)
    except RuntimeError as error:  # torch's, on the CPU and for its OutOfMemoryError alike
        num_mib = num_blocks * block_size * slot_bytes(layer_shapes, loaded.dtype) / 2**20
        raise ConfigError(
            f"The KV cache of {num_blocks} blocks x {block_size} tokens = {num_mib:,.0f} MiB cannot be allocated.",
            hint="Lower --num-blocks.",
        ) from error


def _describe(
    config: EngineConfig,
    loaded: LoadedModel,
    topology: TreeTopology,
    tree_name: str,
    *,
    num_heads: int,
    num_blocks: int,
    node_sizes: tuple[int, ...],
) -> EngineInfo:
    return EngineInfo(
        model_name=loaded.name,
        tokenizer_path=str(loaded.folder),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=sorted(loaded.eos_token_ids),
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        num_heads=num_heads,
        max_depth=topology.max_depth,
        tree=tree_name,
        tree_size=str(config.speculation.tree_size) if topology.num_nodes > 1 else "1",
        tree_sizes=node_sizes,
        head_ranks=topology.head_ranks,
    )
