"""Where kernels can run."""

from __future__ import annotations

import triton


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU: the process was started with TRITON_INTERPRET=1."""
    return bool(triton.knobs.runtime.interpret)
