"""Options of an engine: frozen, keyword-only, validated on construction.

`EngineConfig` holds one dataclass per concern, so that each part of the engine is given only what it needs. Everything here is
plain data that msgspec can encode: the front end sends an `EngineConfig` to the worker process it starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medusa_core.errors import ConfigError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

# Padded tree sizes, root included. A step runs at one of these, so that captured graphs and cost tables stay few.
NODE_BUCKETS: tuple[int, ...] = (1, 4, 8, 16, 32, 64)


def _require(is_valid: bool, message: str) -> None:
    if not is_valid:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model to load, and how.

    model: hub id, local folder, GGUF file, or None for the bundled demo model.
    heads: hub id, folder or file with Medusa heads. None: those shipped with the demo model when `model` is None, else those
        found beside the model. "none": serve without heads.
    max_model_len: longest prompt + output in tokens; None takes the model's own limit.
    """

    model: str | None = None
    revision: str | None = None
    heads: str | None = None
    heads_revision: str | None = None
    dtype: DtypeName = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        has_heads = self.heads not in (None, "none")
        _require(self.revision is None or self.model is not None, "revision is given, but no model that it is a revision of.")
        _require(self.heads_revision is None or has_heads, "heads_revision is given, but no heads that it is a revision of.")
        _require(self.max_model_len is None or self.max_model_len >= 2, "max_model_len must be at least 2.")
        names = ("auto", "float32", "bfloat16", "float16")
        _require(self.dtype in names, f"dtype must be one of {', '.join(names)}, got {self.dtype!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache.

    block_size: tokens per block.
    num_blocks: physical blocks; None sizes the cache from free memory.
    memory_fraction: share of the free memory (measured after the weights are loaded) that the cache may take.
    """

    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float = 0.85
    enable_prefix_cache: bool = True

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}.")
        _require(self.num_blocks is None or self.num_blocks >= 1, "num_blocks must be at least 1.")
        _require(0.0 < self.memory_fraction <= 1.0, f"memory_fraction must be in (0, 1], got {self.memory_fraction}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How requests share a step.

    max_num_seqs: lanes, i.e. choices that can run at once.
    max_step_tokens: most prefill tokens in one step; longer prompts are computed in chunks.
    max_step_rows: most decode rows (lanes x nodes) in one step.
    max_queued_requests: waiting choices above which a request is refused with QueueFullError.
    max_steps_in_flight: steps launched before the oldest one's result is read (0: synchronous). None: 1 where steps are captured,
        so that the host works while the device does, else 0.
    """

    max_num_seqs: int = 256
    max_step_tokens: int = 512
    max_step_rows: int = 1024
    max_queued_requests: int = 1024
    max_steps_in_flight: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_step_tokens", "max_queued_requests"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        _require(
            self.max_step_rows >= self.max_num_seqs,
            f"max_step_rows ({self.max_step_rows}) must be at least max_num_seqs ({self.max_num_seqs}).",
        )
        _require(self.max_steps_in_flight in (None, 0, 1), "max_steps_in_flight must be 0 or 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationConfig:
    """Drafting and the tree.

    prompt_lookup: draft also what prompt and output so far suggest, as a chain of nodes beside those of the heads; it is all of the
        tree where there are no heads.
    tree: name of a published preset, path of a JSON file, or "auto": the best one for the heads' calibrated accuracies, else
        `mc_sim_7b_63`, each with a chain for prompt lookup. A tree that is named is taken as it is; a file may hold such a chain
        itself, as [-1], [-1, -1] and so on.
    tree_size: nodes per step, root included; "auto" chooses each step from measured costs. 1 is plain decoding.
    """

    enabled: bool = True
    prompt_lookup: bool = True
    tree: str = "auto"
    tree_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        is_valid = self.tree_size == "auto" or 1 <= self.tree_size <= NODE_BUCKETS[-1]
        _require(is_valid, f'tree_size must be "auto" or 1..{NODE_BUCKETS[-1]}, got {self.tree_size!r}.')


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    """How steps run on the device. The tokens do not depend on it.

    mode: "captured" runs fused layers and kernels as CUDA graphs, "eager" the plain torch twin on the model's own layers; "auto" is
        "captured" on a CUDA device and "eager" elsewhere. Captured steps without a CUDA device run in Triton's interpreter, for
        tests, and only where the process was started with it.
    """

    mode: Literal["auto", "captured", "eager"] = "auto"

    def __post_init__(self) -> None:
        modes = ("auto", "captured", "eager")
        _require(self.mode in modes, f"mode must be one of {', '.join(modes)}, got {self.mode!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Everything an engine needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
