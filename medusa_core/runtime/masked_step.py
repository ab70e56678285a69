"""Decode steps of lanes with grammars, in three parts: draft, forward pass, draw.

What a grammar allows at a node depends on the drafts above it, which the host must see. A thread makes the masks while the device
is at the second part, and at steps of other lanes launched behind it; the third is launched when they are there. Lanes without a
grammar share the first two parts, as further rows of a forward pass cost next to nothing, and are done behind the second.

Whenever that thread comes back from something that it waited for, it takes the interpreter from the one that launches steps. So it
waits for nothing but llguidance: the other one looks whether the drafts have come, at the next step.

Shapes: B lanes of the step · G lanes with a grammar · N nodes · T packed rows · R most rows of a step · K rows of masks ·
W words of 32 tokens · E hidden.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_core.grammar.lanes import GrammarLanes
from medusa_core.grammar.trees import num_mask_rows
from medusa_core.plan import DecodeGroup
from medusa_core.runtime.capture import capture, has_passed, record_event
from medusa_core.runtime.device_step import DecodeStep, StepParts, TreeRows
from medusa_core.speculation.device_tree import DeviceTree

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WaitingRows:
    """What the rows of a forward pass leave for the draws: their hidden states, and tokens and indices of TreeRows.

    mask_KW, mask_row_R: the masks, and which of them each row that is drawn for has (grammar.trees.TreeMasks). host_*: what they
    are copied from, or to in case of tokens, page-locked on a GPU. To lock memory anew for every step takes up to 4 ms.
    """

    token_R: Tensor
    index_R: Tensor
    hidden_RE: Tensor
    mask_KW: Tensor
    mask_row_R: Tensor
    host_token_R: Tensor
    host_mask_KW: Tensor
    host_mask_row_R: Tensor

    @classmethod
    def create(cls, parts: StepParts, num_rows: int, num_masks: int, num_mask_words: int) -> WaitingRows:
        hidden_PE = parts.lanes.hidden_PE
        token_R, index_R, mask_row_R = torch.zeros(3, num_rows, dtype=torch.int64, device=hidden_PE.device)
        mask_KW = torch.zeros(num_masks, num_mask_words, dtype=torch.int32, device=hidden_PE.device)
        is_cuda = hidden_PE.is_cuda
        return cls(
            token_R=token_R,
            index_R=index_R,
            hidden_RE=hidden_PE.new_zeros(num_rows, hidden_PE.shape[1]),
            mask_KW=mask_KW,
            mask_row_R=mask_row_R,
            host_token_R=torch.zeros(token_R.shape, dtype=token_R.dtype, pin_memory=is_cuda),
            host_mask_KW=torch.zeros(mask_KW.shape, dtype=mask_KW.dtype, pin_memory=is_cuda),
            host_mask_row_R=torch.zeros(mask_row_R.shape, dtype=mask_row_R.dtype, pin_memory=is_cuda),
        )


class SharedPass(DecodeStep):
    """Draft and forward pass of B lanes. Set the lanes, then call `start` and `run_model`, nothing in between.

    lanes_2B: the lanes of the step, and again with the null lane in place of those that wait for masks. is_greedy: of those that do
    not wait; None if all do. result_BR: see DecodeStep, of those that do not wait.
    """

    start: Callable[[], None]
    run_model: Callable[[], None]

    def __init__(
        self, parts: StepParts, lanes_2B: Tensor, tree: DeviceTree, waiting: WaitingRows, *, is_greedy: bool | None
    ) -> None:
        super().__init__(parts, lanes_2B[0], tree, is_greedy=bool(is_greedy))
        self._free_B = lanes_2B[1]
        self._has_free = is_greedy is not None
        self._waiting = waiting
        self._rows: TreeRows | None = None
        self.start, self.run_model = self._start, self._run_model

    def capture(self, warm_up: torch.cuda.Stream, pool: Any) -> None:
        self.start, self.run_model = _capture_parts((self._start, self._run_model), warm_up, pool)

    def _start(self) -> None:
        self._rows = rows = self.pack()
        num_rows = len(rows.token_T)
        self._waiting.token_R[:num_rows].copy_(rows.token_T)
        self._waiting.index_R[:num_rows].copy_(rows.index_T)

    def _run_model(self) -> None:
        rows = self._rows
        assert rows is not None
        hidden_TE = self.forward(rows)
        self._waiting.hidden_RE[: len(hidden_TE)].copy_(hidden_TE)
        if self._has_free:
            # The rows of lanes that wait are drawn for in the null lane's name, which changes nothing.
            free_T = self._free_B.repeat_interleave(self.tree.num_nodes)
            self.finish(rows._replace(lane_T=free_T), hidden_TE, self._free_B)


class MaskedDraw(DecodeStep):
    """Draws of G lanes, from rows of the latest SharedPass. Set the inputs, then call `end`.

    inputs_2G: the lanes, and their places in the pass.
    """

    end: Callable[[], None]

    def __init__(self, parts: StepParts, inputs_2G: Tensor, tree: DeviceTree, waiting: WaitingRows) -> None:
        lane_G, self._place_G = inputs_2G
        super().__init__(parts, lane_G, tree, is_greedy=False)
        self._waiting = waiting
        self._node_N = torch.arange(tree.num_nodes, device=lane_G.device)
        self.end = self._end

    def capture(self, warm_up: torch.cuda.Stream, pool: Any) -> None:
        (self.end,) = _capture_parts((self._end,), warm_up, pool)

    def _end(self) -> None:
        waiting, num_nodes = self._waiting, self.tree.num_nodes
        row_T = (self._place_G.unsqueeze(1) * num_nodes + self._node_N).flatten()
        mask_row_T = waiting.mask_row_R[: len(row_T)]
        rows = TreeRows(
            # no token is -1, so nobody descends there
            token_T=torch.where(mask_row_T < 0, -1, waiting.token_R[row_T]),
            index_T=waiting.index_R[row_T],
            lane_T=self.lane_B.repeat_interleave(num_nodes),
            # of no use once the model has run
            position_T=row_T,
            slot_T=row_T,
            base_B=self.lane_B,
        )
        self.finish(rows, waiting.hidden_RE[row_T], self.lane_B, waiting.mask_KW[mask_row_T.clamp(min=0)])


@dataclass(slots=True)
class BegunStep:
    """Lanes that wait for masks.

    first_place: of the lanes, in the pass. is_drafted: passes when their drafts are on the host. masks: done when these are in
    WaitingRows; None until the thread has been told of them.
    """

    group: DecodeGroup
    shared: SharedPass
    first_place: int
    is_drafted: torch.cuda.Event | None
    masks: Future[None] | None = None


class MaskedSteps:
    """Begins and ends the steps of a runner that wait for masks.

    They are made and captured when they are first needed, so that a server without grammars has nothing of them.

    trees: by number of nodes. buckets: (lanes, nodes) of the steps there may be.
    """

    def __init__(
        self,
        parts: StepParts,
        grammars: GrammarLanes,
        parents: Sequence[int],
        trees: Mapping[int, DeviceTree],
        buckets: Sequence[tuple[int, int]],
    ) -> None:
        self._parts = parts
        self._grammars = grammars
        self._parents = tuple(parents)
        self._trees = trees
        self._sizes = {nodes: sorted(size for size, n in buckets if n == nodes) for nodes in trees}
        self._num_rows = max(lanes * nodes for lanes, nodes in buckets)
        self._waiting: WaitingRows | None = None
        # the masks of the step before
        self._is_copied: torch.cuda.Event | None = None
        self._shared: dict[tuple[int, int, bool | None], SharedPass] = {}
        self._draws: dict[tuple[int, int], MaskedDraw] = {}
        self._inputs: dict[tuple[str, int], Tensor] = {}
        # What is in the inputs now: a list that stays is not sent again.
        self._loaded: dict[tuple[str, int], list[list[int]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        # stream and memory, once the runner captures
        self.capture_on: tuple[torch.cuda.Stream, Any] | None = None

    def can_share(self, group: DecodeGroup, beside: DecodeGroup) -> bool:
        """Whether a group without grammars fits into the pass of one with them."""
        return group.num_nodes == beside.num_nodes and len(group.lanes) + len(beside.lanes) <= self._sizes[group.num_nodes][-1]

    def begin(self, group: DecodeGroup, beside: DecodeGroup | None) -> BegunStep:
        """Draft, and run the model; be done with the lanes of `beside`, whose results are the first of the pass. The step must end
        before another begins."""
        free = [] if beside is None else beside.lanes
        is_greedy = None if beside is None else self._parts.lanes.is_all_greedy(free)
        shared = self._pass_of(len(free) + len(group.lanes), group.num_nodes, is_greedy)
        null = self._parts.lanes.null_lane
        padding = [null] * (shared.lane_B.shape[0] - len(free) - len(group.lanes))
        self._load("pass", [[*free, *group.lanes, *padding], [*free, *[null] * len(group.lanes), *padding]])
        shared.start()
        waiting = self._rows()
        first_row, num_rows = len(free) * group.num_nodes, len(group.lanes) * group.num_nodes
        waiting.host_token_R[:num_rows].copy_(waiting.token_R[first_row : first_row + num_rows], non_blocking=True)
        is_drafted = record_event(self._parts.lanes.device)
        shared.run_model()
        return BegunStep(group, shared, len(free), is_drafted)

    def has_masks(self, begun: BegunStep) -> bool:
        """Whether the masks are there. The thread begins with them when this finds the drafts on the host."""
        if begun.masks is None and (begun.is_drafted is None or has_passed(begun.is_drafted)):
            begun.masks = self._thread.submit(self._make_masks, begun.group)
        return begun.masks is not None and begun.masks.done()

    def _make_masks(self, group: DecodeGroup) -> None:
        waiting = self._rows()
        # smaller trees are the first nodes of larger ones
        parents = self._parents[: group.num_nodes]
        mask_KW = waiting.host_mask_KW.numpy()[: len(group.lanes) * num_mask_rows(parents)]
        if self._is_copied is not None and not has_passed(self._is_copied):
            self._is_copied.synchronize()
        num_rows = len(group.lanes) * group.num_nodes
        token_GN = waiting.host_token_R.numpy()[:num_rows].reshape(len(group.lanes), group.num_nodes)
        masks = self._grammars.fill(group.lanes, token_GN, parents, mask_KW=mask_KW)
        waiting.host_mask_row_R.numpy()[:num_rows] = masks.row_BN.ravel()

    def end(self, begun: BegunStep) -> MaskedDraw:
        """Wait for the masks, and draw. The results are those of the returned step."""
        lanes, num_nodes = begun.group.lanes, begun.group.num_nodes
        if begun.masks is not None:
            begun.masks.result()
        else:
            if begun.is_drafted is not None:
                begun.is_drafted.synchronize()
            self._make_masks(begun.group)
        draw, waiting = self._draw_of(len(lanes), num_nodes), self._rows()
        num_masks = len(lanes) * num_mask_rows(self._parents[:num_nodes])
        waiting.mask_KW[:num_masks].copy_(waiting.host_mask_KW[:num_masks], non_blocking=True)
        num_rows = len(lanes) * num_nodes
        waiting.mask_row_R[:num_rows].copy_(waiting.host_mask_row_R[:num_rows], non_blocking=True)
        self._is_copied = record_event(self._parts.lanes.device)
        num_padding = draw.lane_B.shape[0] - len(lanes)
        places = range(begun.first_place, begun.first_place + len(lanes))
        self._load("draw", [[*lanes, *[self._parts.lanes.null_lane] * num_padding], [*places, *[0] * num_padding]])
        draw.end()
        return draw

    def _pass_of(self, num_lanes: int, num_nodes: int, is_greedy: bool | None) -> SharedPass:
        size = self._bucket(num_lanes, num_nodes)
        key = size, num_nodes, is_greedy
        if key not in self._shared:
            step = SharedPass(self._parts, self._input("pass", size), self._trees[num_nodes], self._rows(), is_greedy=is_greedy)
            self._capture(step, "pass", size)
            self._shared[key] = step
        return self._shared[key]

    def _draw_of(self, num_lanes: int, num_nodes: int) -> MaskedDraw:
        size = self._bucket(num_lanes, num_nodes)
        if (size, num_nodes) not in self._draws:
            step = MaskedDraw(self._parts, self._input("draw", size), self._trees[num_nodes], self._rows())
            self._capture(step, "draw", size)
            self._draws[size, num_nodes] = step
        return self._draws[size, num_nodes]

    def _bucket(self, num_lanes: int, num_nodes: int) -> int:
        sizes = self._sizes[num_nodes]
        return sizes[bisect.bisect_left(sizes, num_lanes)]

    def _rows(self) -> WaitingRows:
        if self._waiting is None:
            num_masks = max(lanes * num_mask_rows(self._parents[:nodes]) for nodes, sizes in self._sizes.items() for lanes in sizes)
            self._waiting = WaitingRows.create(self._parts, self._num_rows, num_masks, self._grammars.num_mask_words)
        return self._waiting

    def _input(self, kind: str, size: int) -> Tensor:
        if (kind, size) not in self._inputs:
            self._inputs[kind, size] = torch.zeros(2, size, dtype=torch.int64, device=self._parts.lanes.device)
        return self._inputs[kind, size]

    def _load(self, kind: str, values: list[list[int]]) -> None:
        where = kind, len(values[0])
        if self._loaded.get(where) != values:
            self._loaded[where] = values
            self._inputs[where].copy_(self._parts.lanes.upload(np.array(values, dtype=np.int64)))

    def _capture(self, step: SharedPass | MaskedDraw, kind: str, size: int) -> None:
        """On null lanes, which nothing happens to."""
        if self.capture_on is None:
            return
        null = self._parts.lanes.null_lane
        self._load(kind, [[null] * size, [null if kind == "pass" else 0] * size])
        try:
            step.capture(*self.capture_on)
        except RuntimeError as error:
            logger.warning("A step under grammars cannot be captured and runs kernel by kernel, which is slower: %s", error)


def _capture_parts(parts: Sequence[Callable[[], None]], warm_up: torch.cuda.Stream, pool: Any) -> list[Callable[[], None]]:
    replays = []
    for part in parts:
        replays.append(capture(part, warm_up, pool))
        # A capture computes nothing, and the next part reads what this one leaves.
        replays[-1]()
    return replays
