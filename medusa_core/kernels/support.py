"""Where kernels can run, and how."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# What a Hopper chip gives a program; the cuts of products and attention were chosen there.
_HOPPER_SHARED_BYTES = 227 * 1024
# What Triton raises for a kernel that it cannot compile, or that a GPU has no room for. No RuntimeError.
KernelError = triton.TritonError


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU: the process was started with TRITON_INTERPRET=1."""
    return bool(triton.knobs.runtime.interpret)


def can_overlap_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the one before still runs (programmatic dependent launch: sm_90 and later)."""
    return device.type == "cuda" and not is_interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(use_pdl: bool) -> dict[str, Any]:
    """Keyword arguments of a launch that may start while the kernel before still runs. The kernel itself must then wait for that
    one before it touches anything that changes from step to step (`follow_on`)."""
    return {"launch_pdl": True} if use_pdl else {}


@triton.jit
def follow_on(USE_PDL: tl.constexpr):
    """First line of a kernel that reads nothing ahead: the next kernel may start, and this one waits for the one before."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@cache
def shared_memory_bytes(device: torch.device) -> int:
    """Most shared memory that one program of a kernel may use."""
    if device.type != "cuda":
        return _HOPPER_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@triton.jit
def _one_kernel(out):
    tl.store(out, 1)


def run_a_kernel(device: torch.device) -> None:
    """Compile and run the smallest of kernels.

    Raises RuntimeError, or what Python raises, where that is not possible: no C compiler, a GPU that Triton does not know.
    """
    out = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        _one_kernel[(1,)](out)
    except KernelError as error:
        raise RuntimeError(str(error)) from error
