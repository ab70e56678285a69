"""Where kernels can run, and how."""

from __future__ import annotations

import torch
import triton


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU: the process was started with TRITON_INTERPRET=1."""
    return bool(triton.knobs.runtime.interpret)


def can_overlap_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the one before still runs (programmatic dependent launch: sm_90 and later)."""
    return device.type == "cuda" and not is_interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)
