"""Where and with what a benchmark ran: without it a figure means nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from medusa_core import __version__

_PACKAGES = ("torch", "transformers", "triton", "tokenizers", "msgspec")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """commit: of the working tree this package lies in, with "+ changes" where it was edited; None for an installed package."""

    date: str
    medusa_version: str
    commit: str | None
    python: str
    packages: dict[str, str]
    system: str
    cpu: str
    num_cpus: int
    gpu: str | None
    gpu_driver: str | None
    cuda: str | None


def describe_machine() -> Machine:
    has_gpu = torch.cuda.is_available()
    return Machine(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        medusa_version=__version__,
        commit=git_commit(Path(__file__).parent),
        python=platform.python_version(),
        packages=_package_versions(),
        system=platform.platform(),
        cpu=_cpu_name(Path("/proc/cpuinfo")),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpu=torch.cuda.get_device_name(0) if has_gpu else None,
        gpu_driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_gpu else None,
        cuda=torch.version.cuda if has_gpu else None,
    )


def command_line() -> str:
    """The command as typed, without what comes after `--api-key`."""
    parts = ["medusa", *sys.argv[1:]]
    for index, part in enumerate(parts):
        if part == "--api-key" and index + 1 < len(parts):
            parts[index + 1] = "..."
        elif part.startswith("--api-key="):
            parts[index] = "--api-key=..."
    return " ".join(parts)


def git_commit(folder: Path) -> str | None:
    """Commit of the working tree around `folder`, None if it is in none."""
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    has_changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} + changes" if has_changes else commit


def _output(*command: str) -> str | None:
    """First line that a program prints; None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
