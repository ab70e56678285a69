"""What `--device auto` and `--dtype auto` mean on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from medusa_core.config import DtypeName
from medusa_core.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BF16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA GPU, else the CPU. Raises ConfigError for devices this machine lacks."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} is not available ({torch.cuda.device_count()} CUDA devices found).", hint="Use --device cpu."
        )
    return device


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 where the device is fast at it, else float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if has_fast_cpu_bf16(Path("/proc/cpuinfo")) else torch.float32


def has_fast_cpu_bf16(cpuinfo: Path) -> bool:
    """True if the kernel lists a bfloat16 product among the CPU's features."""
    # torch's own query is private and has moved between releases; the kernel's list of CPU features is stable.
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return not _BF16_CPU_FLAGS.isdisjoint(flags)
