"""A decode step of lanes with grammars, in three parts: draft, forward pass, draw.

What a grammar allows at a node depends on the drafts above it, which the host must see. It waits for the first part only, and makes
the masks while the device is at the second; they arrive before the third. The parts hand tensors on to each other, which stay where
they are once the parts are captured; no other step of the kind may run in between.

Shapes: B lanes of the step · N nodes · T = B * N packed rows · W words of 32 tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_core.runtime.capture import capture
from medusa_core.runtime.device_step import DecodeStep, StepParts, TreeRows
from medusa_core.speculation.device_tree import DeviceTree

logger = logging.getLogger(__name__)


class MaskedDecodeStep(DecodeStep):
    """Set the lanes, then call `start`, `run_model`, `load_masks` and `end`.

    bits_RW: int32, of at least T rows; where the masks go. start: drafts. end: draws, walks and commits.
    """

    start: Callable[[], None]
    run_model: Callable[[], None]
    end: Callable[[], None]

    def __init__(self, parts: StepParts, lane_B: Tensor, tree: DeviceTree, bits_RW: Tensor) -> None:
        super().__init__(parts, lane_B, tree, is_greedy=False)
        self._bits_TW = bits_RW[: lane_B.shape[0] * tree.num_nodes]
        self._rows: TreeRows | None = None
        self._hidden_TE: Tensor | None = None
        self.start, self.run_model, self.end = self._start, self._run_model, self._end

    @property
    def token_BN(self) -> Tensor:
        """Token of every node, int64, when `start` has run."""
        assert self._rows is not None
        return self._rows.token_T.view(-1, self.tree.num_nodes)

    def load_masks(self, bits_bNW: np.ndarray, is_left_out_bN: np.ndarray) -> None:
        """What GrammarLanes.fill says of the first b lanes, behind which there are null lanes only."""
        upload = self._parts.lanes.upload
        bits_rW = bits_bNW.reshape(-1, bits_bNW.shape[2])
        self._bits_TW[: len(bits_rW)].copy_(upload(bits_rW))
        if is_left_out_bN.any():
            # no token is -1, so nobody descends there
            self.token_BN[: len(is_left_out_bN)].masked_fill_(upload(is_left_out_bN), -1)

    def capture(self, warm_up: torch.cuda.Stream, pool: Any) -> None:
        """Capture the parts, if they can be. The lanes must be null lanes."""
        replays = []
        try:
            for part in (self._start, self._run_model, self._end):
                replays.append(capture(part, warm_up, pool))
                # A capture computes nothing, and the next part reads what this one leaves.
                replays[-1]()
        except RuntimeError as error:
            logger.warning("A step under grammars cannot be captured and runs kernel by kernel, which is slower: %s", error)
        else:
            self.start, self.run_model, self.end = replays

    def _start(self) -> None:
        self._rows = self.pack()

    def _run_model(self) -> None:
        assert self._rows is not None
        self._hidden_TE = self.forward(self._rows)

    def _end(self) -> None:
        assert self._rows is not None
        assert self._hidden_TE is not None
        self.finish(self._rows, self._hidden_TE, self._bits_TW)
