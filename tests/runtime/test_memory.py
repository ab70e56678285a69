"""The size of the KV cache, and the sentence that explains why it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medusa_core.config import CacheConfig
from medusa_core.errors import ConfigError
from medusa_core.runtime import memory
from medusa_core.runtime.memory import choose_num_blocks, free_memory_bytes

MIB = 2**20
# Blocks of 16 tokens x 4 KiB = 64 KiB, 16 of them per MiB.
SIZES = {"slot_bytes": 4096, "max_blocks_per_lane": 10, "num_lanes": 8, "device_type": "cuda"}


def choose(free_mib: float, config: CacheConfig | None = None, **sizes: object) -> int:
    config = config or CacheConfig(memory_fraction=0.5)
    return choose_num_blocks(config, free_bytes=int(free_mib * MIB), **{"logits_bytes": 0, **SIZES, **sizes})


def test_the_memory_share_sets_the_number_of_blocks():
    assert choose(2) == 16
    assert choose(3) == 24
    assert choose(2, CacheConfig(memory_fraction=1.0)) == 32
    assert choose(2, CacheConfig(memory_fraction=0.5, block_size=8)) == 32


def test_logits_are_set_aside_first():
    assert choose(3, logits_bytes=MIB) == choose(2)
    with pytest.raises(ConfigError, match="1 MiB for logits"):
        choose(0.5, logits_bytes=MIB)


def test_no_more_than_all_lanes_can_use():
    assert choose(1_000_000) == 80
    assert choose(1_000_000, num_lanes=1) == 10


def test_a_cpu_gives_4_gib_at_most_by_default():
    assert choose(100_000, num_lanes=10**6, device_type="cpu") == 4096 * 16
    assert choose(100_000, num_lanes=10**6) == 50_000 * 16
    assert choose(6000, num_lanes=10**6, device_type="cpu") == 3000 * 16


def test_a_number_of_blocks_that_was_asked_for_is_taken():
    assert choose(0.001, CacheConfig(num_blocks=10)) == 10
    assert choose(1_000_000, CacheConfig(num_blocks=10_000)) == 10_000


def test_too_little_memory_is_explained_with_the_arithmetic():
    with pytest.raises(ConfigError) as error:
        choose(1)
    message = str(error.value)
    assert "needs 10 blocks of 16 tokens x 4,096 bytes = 1 MiB" in message
    assert "gives 8 blocks ((1 MiB free - 0 MiB for logits) x memory fraction 0.5)" in message
    assert "--max-model-len" in message


def test_too_few_blocks_asked_for_name_the_option():
    with pytest.raises(ConfigError, match="--num-blocks gives 9 blocks"):
        choose(1000, CacheConfig(num_blocks=9))


def test_a_request_of_the_maximum_length_fits_exactly():
    assert choose(1.25) == 10
    with pytest.raises(ConfigError):
        choose(1.24)


def test_free_memory_is_what_the_machine_has():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory_bytes(torch.device("cpu")) <= total


@pytest.mark.parametrize(("limit", "used", "free"), [("1000", "300", 700), ("1000", "1200", 0), ("max", "300", 5000)])
def test_the_limit_of_a_container_counts(tmp_path: Path, limit, used, free):
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert memory._cgroup_free_bytes(tmp_path, 5000) == free
    assert memory._cgroup_free_bytes(tmp_path / "none", 5000) == 5000


@pytest.mark.cuda
def test_memory_that_torch_keeps_for_later_is_free():
    device = torch.device("cuda:0")
    before = free_memory_bytes(device)
    kept = torch.empty(2**28, dtype=torch.uint8, device=device)
    del kept
    assert free_memory_bytes(device) >= before
