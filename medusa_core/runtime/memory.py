"""How many KV blocks fit: the arithmetic, and the message when they do not. And giving memory back."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from medusa_core.config import CacheConfig
from medusa_core.errors import ConfigError

# On a CPU the memory is shared with everything else on the machine, so a default that takes most of it would be rude.
_MAX_DEFAULT_CPU_BYTES = 4 * 2**30


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device, the container's limit included."""
    if device.type == "cuda":
        # What torch keeps for later, such as the memory of weights that were swapped for fused ones, is free too.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min(available, _cgroup_free_bytes(Path("/sys/fs/cgroup"), available))


def release_memory() -> None:
    """Give back what a model or an engine has held, once the last name for it is gone: for the next one in this process."""
    gc.collect()
    torch.cuda.empty_cache()


def _cgroup_free_bytes(folder: Path, default: int) -> int:
    """What the control group (version 2) of this process still allows; `default` where there is none or no limit."""
    try:
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
    except OSError:
        return default
    return default if limit == "max" else max(int(limit) - int(used), 0)


def choose_num_blocks(
    config: CacheConfig,
    *,
    free_bytes: int,
    logits_bytes: int,
    slot_bytes: int,
    max_blocks_per_lane: int,
    num_lanes: int,
    device_type: str,
) -> int:
    """Blocks of the KV cache.

    Args:
        free_bytes: memory free after the weights were loaded. logits_bytes: what the largest step takes of it for logits.
        slot_bytes: bytes of one token, all layers.
        max_blocks_per_lane: blocks one request of the maximum length needs, its tree included.

    Returns:
        `config.num_blocks` if set, else what fits in the memory share, and no more than all lanes can use.

    Raises:
        ConfigError: not even one request of the maximum length fits.
    """
    block_bytes = slot_bytes * config.block_size
    budget = max(int((free_bytes - logits_bytes) * config.memory_fraction), 0)
    if config.num_blocks is not None:
        num_blocks, source = config.num_blocks, "--num-blocks"
    else:
        if device_type == "cpu":
            budget = min(budget, _MAX_DEFAULT_CPU_BYTES)
        num_blocks, source = min(budget // block_bytes, max_blocks_per_lane * num_lanes), f"{budget / 2**20:,.0f} MiB"
    if num_blocks < max_blocks_per_lane:
        raise ConfigError(
            f"The KV cache is too small: a request of the maximum length needs {max_blocks_per_lane} blocks of {config.block_size} "
            f"tokens x {slot_bytes:,} bytes = {max_blocks_per_lane * block_bytes / 2**20:,.0f} MiB, but {source} gives "
            f"{num_blocks} blocks (({free_bytes / 2**20:,.0f} MiB free - {logits_bytes / 2**20:,.0f} MiB for logits) "
            f"x memory fraction {config.memory_fraction}).",
            hint="Lower --max-model-len or --max-num-seqs, or raise --memory-fraction or --num-blocks.",
        )
    return num_blocks
