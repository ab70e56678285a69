"""Which kernels a step spends its time in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

NUM_KERNELS = 25


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """us_per_step: all its calls of a step. share: of the time in all kernels."""

    name: str
    calls_per_step: float
    us_per_step: float
    share: float


@dataclass(frozen=True, kw_only=True)
class KernelTable:
    """kernels: the longest first. total_us_per_step: time in all kernels, those not listed too; the rest of the step the device was
    waiting."""

    num_lanes: int
    num_nodes: int
    total_us_per_step: float
    num_kernels_per_step: float
    kernels: list[Kernel]


def profile_steps(
    run: Callable[[], object], num_steps: int, device: torch.device, *, num_lanes: int, num_nodes: int
) -> KernelTable:
    """Profile `run`, which runs `num_steps` steps and waits for them. On a CPU the operators of torch stand for kernels."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        run()
        if is_cuda:
            torch.cuda.synchronize(device)
    wanted = "CUDA" if is_cuda else "CPU"
    events = [event for event in profiler.key_averages() if event.device_type.name == wanted]
    return make_table([_row(event, is_cuda) for event in events], num_steps, num_lanes=num_lanes, num_nodes=num_nodes)


def make_table(rows: list[tuple[str, int, float]], num_steps: int, *, num_lanes: int, num_nodes: int) -> KernelTable:
    """rows: name, calls and microseconds over `num_steps` steps."""
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total_us = sum(us for _, _, us in rows)
    return KernelTable(
        num_lanes=num_lanes,
        num_nodes=num_nodes,
        total_us_per_step=total_us / num_steps,
        num_kernels_per_step=sum(calls for _, calls, _ in rows) / num_steps,
        kernels=[
            Kernel(name=name, calls_per_step=calls / num_steps, us_per_step=us / num_steps, share=us / total_us)
            for name, calls, us in rows[:NUM_KERNELS]
        ],
    )


def _row(event: Any, is_cuda: bool) -> tuple[str, int, float]:
    return event.key, event.count, event.self_device_time_total if is_cuda else event.self_cpu_time_total
