"""Capturing work on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def new_event(*, enable_timing: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=enable_timing)  # type: ignore[no-untyped-call]


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Passes when the device has done what has been launched so far. None for a CPU, where it has been done."""
    if device.type != "cuda":
        return None
    event = new_event()
    event.record()
    return event


def has_passed(event: torch.cuda.Event) -> bool:
    """Whether the device has done what was launched before the event. Does not wait."""
    return event.query()  # type: ignore[no-untyped-call,no-any-return]


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def capture(step: Callable[[], object], warm_up: torch.cuda.Stream, pool: Any) -> Callable[[], None]:
    """Run the step once, which compiles its kernels and lets libraries allocate what they need, then record it."""
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay
