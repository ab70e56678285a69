"""Runs plans as captured steps: one graph per size of step, replayed with nothing but a list of lanes from the host.

At start a decode step is captured for every (lanes, nodes) bucket under the row budget, and a prefill step for every number of
rows, each once for lanes that all decode greedily and once for lanes that sample. A plan's groups are filled up to the next bucket
with the null lane; its chunks run behind them as a second launch. Results leave the device by a copy of their own, so the next
step can be launched before they are read.

Steps under grammars wait for masks from the host in their middle (runtime/masked_step.py). Others are launched meanwhile.

Without a CUDA device the same steps run uncaptured, in Triton's interpreter; that is how the tests cover them on a CPU.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from medusa_core.errors import ConfigError
from medusa_core.grammar.lanes import GrammarLanes
from medusa_core.kernels.topk import topk_rows
from medusa_core.kernels.tree_step import NUM_RESULT_COLUMNS
from medusa_core.plan import DecodeGroup, PrefillChunk, StepPlan
from medusa_core.runtime.buckets import chunk_buckets, decode_buckets, lane_buckets
from medusa_core.runtime.capture import capture, has_passed, new_event, new_stream, record_event
from medusa_core.runtime.device_step import DecodeStep, PrefillStep, StepParts
from medusa_core.runtime.launched import LaunchedGroup, PendingGraphResult
from medusa_core.runtime.logprobs import ChunkLogprobs, PathLogprobs, chunk_logprobs, to_host
from medusa_core.runtime.masked_step import BegunStep, MaskedSteps
from medusa_core.sampling.logprobs import logprobs_of_hidden
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.tree.topology import TreeTopology

logger = logging.getLogger(__name__)

# Chunks of one prefill launch that may draw; a plan with more of them launches again.
MAX_CHUNKS = 16
_NUM_TIMED = 5
# Known tokens of a lane when steps are timed.
_TYPICAL_CONTEXT = 512


class GraphRunner:
    """plan.Runner over captured steps.

    node_sizes: every tree size that plans may name. max_rows: most decode rows (lanes x nodes) of a plan. max_chunk_rows: most
    prefill tokens of a plan.
    """

    def __init__(
        self,
        parts: StepParts,
        topology: TreeTopology,
        grammars: GrammarLanes,
        *,
        node_sizes: Sequence[int],
        max_rows: int,
        max_chunk_rows: int,
    ) -> None:
        self._parts = parts
        self._topology = topology
        self._grammars = grammars
        self._lanes = parts.lanes
        self._max_chunk_rows = max_chunk_rows
        device = parts.model.device
        self._is_cuda = device.type == "cuda"
        max_lanes = parts.lanes.num_lanes
        self._sizes = lane_buckets(max_lanes)
        # The lanes of a step, by bucket, and what is in there now: a list that stays is not sent again.
        self._lane_inputs = {size: torch.full((size,), parts.lanes.null_lane, device=device) for size in self._sizes}
        self._loaded: dict[int, list[int]] = {}
        self._trees = {nodes: DeviceTree.create(topology.prefix(nodes), device) for nodes in node_sizes}
        buckets = decode_buckets(max_lanes, node_sizes, max_rows)
        self._decode = {
            (size, nodes, is_greedy): DecodeStep(parts, self._lane_inputs[size], self._trees[nodes], is_greedy=is_greedy)
            for size, nodes in buckets
            for is_greedy in (True, False)
        }
        self._masked = MaskedSteps(parts, grammars, topology.parents, self._trees, buckets)
        # the lanes that wait for masks, and those drawn for late whose results have not been given out
        self._waiting: BegunStep | None = None
        self._late: list[tuple[LaunchedGroup, torch.cuda.Event | None]] = []
        self._latest: PendingGraphResult | None = None
        self._chunk_sizes = chunk_buckets(max_chunk_rows)
        # All ones, but for the lanes with a grammar in the latest step.
        self._chunk_bits_CW = torch.full((MAX_CHUNKS, grammars.num_words), -1, dtype=torch.int32, device=device)
        self._has_chunk_masks = False
        self._prefill = {
            (rows, is_greedy): PrefillStep(parts, rows, self._chunk_bits_CW, is_greedy=is_greedy)
            for rows in self._chunk_sizes
            for is_greedy in (True, False)
        }
        self._replay: dict[DecodeStep | PrefillStep, Callable[[], None]] = {}

    @property
    def num_graphs(self) -> int:
        return len(self._replay)

    @torch.inference_mode()
    def capture(self, *, progress: bool = False) -> None:
        """Capture every step. Before this, or without CUDA, steps run kernel by kernel; so do those of a model whose forward pass
        cannot be captured, because it asks the device for values on the way."""
        if not self._is_cuda:
            return
        steps: list[DecodeStep | PrefillStep] = [*self._decode.values(), *self._prefill.values()]
        # The largest first: later captures then reuse its memory, as no two graphs run at once.
        steps.sort(key=lambda step: -_num_rows(step))
        # What captures share: the stream of their warm-up, as the allocator keeps the memory of each apart, and their own memory.
        warm_up, pool = self._masked.capture_on = new_stream(), torch.cuda.graph_pool_handle()
        try:
            for step in tqdm(steps, desc="capturing steps", disable=not progress):
                self._replay[step] = capture(step, warm_up, pool)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The device's memory does not hold the steps of {self._lanes.num_lanes} lanes ({len(self._replay)} captured).",
                hint="Lower --max-num-seqs or --memory-fraction.",
            ) from error
        except RuntimeError as error:
            self._replay.clear()
            self._masked.capture_on = None
            logger.warning("The model's steps cannot be captured and run kernel by kernel, which is slower: %s", error)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingGraphResult:
        """Apply lane changes, launch the decode groups, then the chunks.

        Lanes that wait for masks are drawn for as soon as the masks are seen to be there: nobody else waits for them.
        Where those lanes have trees of several sizes, the later ones wait for the earlier ones' masks, behind all launches.
        """
        masked = [group for group in plan.decode_groups if group.has_grammar]
        if masked or self._waits_for(plan.leaves) or self._has_masks:
            self._end_waiting()
        self._lanes.apply(plan, self._parts.model.eos_token_ids)
        self._grammars.apply(plan)
        free = [group for group in plan.decode_groups if not group.has_grammar]
        groups: list[LaunchedGroup] = []
        if masked:
            # one that shares its pass, if there is one
            masked.sort(key=lambda group: not any(self._masked.can_share(group, other) for other in free))
            beside = next((other for other in free if self._masked.can_share(masked[0], other)), None)
            self._waiting = self._masked.begin(masked[0], beside)
            if beside is not None:
                free.remove(beside)
                groups.append(self._collect(beside.lanes, self._waiting.shared))
        groups += [self._launch_group(group) for group in free]
        prompt_logprobs: list[ChunkLogprobs] = []
        for chunks in _launches(plan.chunks, self._max_chunk_rows):
            drawn = self._launch_chunks(chunks)
            groups += [drawn] if drawn is not None else []
            hidden_TE, project = self._parts.chunk_hidden_TE, self._parts.model.project
            prompt_logprobs += chunk_logprobs(self._lanes, chunks, hidden_TE, project, top_k=topk_rows)
        # Chunks are waited for also where they bring nothing: else all of a long prompt would be launched ahead, in front of
        # everything that comes meanwhile.
        is_done = record_event(self._lanes.device) if groups or plan.chunks else None
        self._latest = PendingGraphResult(plan.step_id, groups, prompt_logprobs, is_done, self._grammars, self._take_late)
        for group in masked[1:]:
            self._end_waiting()
            self._waiting = self._masked.begin(group, None)
        if self._has_masks:
            self._end_waiting()
        return self._latest

    @torch.inference_mode()
    def _take_late(self, step: PendingGraphResult) -> list[LaunchedGroup]:
        """What was drawn late and is on the host: everything, if no step was launched behind this one."""
        if step is self._latest:
            self._end_waiting()
        late, self._late = self._late, []
        groups = []
        for group, is_done in late:
            if is_done is not None and step is self._latest:
                is_done.synchronize()
            if is_done is None or has_passed(is_done):
                groups.append(group)
            else:
                self._late.append((group, is_done))
        return groups

    def _end_waiting(self) -> None:
        """Draw for the lanes that wait for masks, if any do."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._late.append((self._collect(waiting.group.lanes, self._masked.end(waiting)), record_event(self._lanes.device)))

    @property
    def _has_masks(self) -> bool:
        """Whether lanes have waited for masks that are there by now."""
        return self._waiting is not None and self._masked.has_masks(self._waiting)

    def _waits_for(self, lanes: Sequence[int]) -> bool:
        return self._waiting is not None and not set(lanes).isdisjoint(self._waiting.group.lanes)

    @torch.inference_mode()
    def measure_decode(self) -> dict[tuple[int, int], float]:
        """Seconds on the device of a decode step, by (lanes, nodes), behind a context of typical length.

        Trees cost more the longer the context, plain steps less so. Runs on lanes that are marked finished, so that nothing moves
        on, but writes to blocks: call it before anything is cached, and while no request runs. Joins fill the lanes anew.
        """
        lanes, tables = self._lanes, self._parts.tables
        most = max(nodes for _, nodes, _ in self._decode)
        num_blocks = tables.spare_slot // tables.block_size
        num_known = max(min(_TYPICAL_CONTEXT, lanes.max_model_len - 1, num_blocks * tables.block_size - most), 1)
        width = min(-(-(num_known + most) // tables.block_size), num_blocks, tables.table_PX.shape[1])
        block_ids = torch.arange(lanes.num_lanes * width, device=tables.table_PX.device) % num_blocks
        tables.table_PX[: lanes.num_lanes, :width] = block_ids.view(lanes.num_lanes, width)
        lanes.num_known_P[: lanes.num_lanes] = num_known
        lanes.is_finished_P.fill_(1)
        seconds = {}
        for (size, nodes, is_greedy), step in self._decode.items():
            if is_greedy:
                self._load_lanes(size, list(range(size)))
                seconds[size, nodes] = self._seconds(self._launcher(step))
        return seconds

    @torch.inference_mode()
    def measure_prefill(self) -> dict[int, float]:
        """Seconds on the device of a prefill step, by rows, without context."""
        seconds = {}
        for (rows, is_greedy), step in self._prefill.items():
            if is_greedy:
                step.load([])
                seconds[rows] = self._seconds(self._launcher(step))
        return seconds

    @torch.inference_mode()
    def draft_seconds(self, num_lanes: int, num_nodes: int) -> float:
        """Seconds on the device of drafting alone, a part of the decode step: the heads and their best tokens.

        In a step, drafting comes behind a pass through the model, which leaves nothing of the heads in the device's caches.
        """
        step = self._decode[self._sizes[bisect.bisect_left(self._sizes, num_lanes)], num_nodes, True]
        if not self._is_cuda:
            return self._seconds(step.draft)
        cache_bytes = torch.cuda.get_device_properties(self._parts.model.device).L2_cache_size
        other = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=self._parts.model.device)
        return self._seconds(capture(step.draft, new_stream(), None), before=other.zero_)

    def _launch_group(self, group: DecodeGroup) -> LaunchedGroup:
        size = self._bucket(group)
        self._load_lanes(size, group.lanes)
        step = self._decode[size, group.num_nodes, self._lanes.is_all_greedy(group.lanes)]
        self._launcher(step)()
        return self._collect(group.lanes, step)

    def _load_chunk_masks(self, drawing: Sequence[int]) -> None:
        """Of the lanes that the next prefill step draws for."""
        places = [place for place, lane in enumerate(drawing) if lane in self._grammars]
        if places:
            bits_CW = np.full(self._chunk_bits_CW.shape, -1, dtype=np.int32)
            no_draft_B1 = np.zeros((len(places), 1), dtype=np.int64)
            masks = self._grammars.fill([drawing[place] for place in places], no_draft_B1, (-1,))
            bits_CW[places] = masks.mask_KW[masks.row_BN[:, 0], : bits_CW.shape[1]]
            self._chunk_bits_CW.copy_(self._lanes.upload(bits_CW))
        elif self._has_chunk_masks:
            self._chunk_bits_CW.fill_(-1)
        self._has_chunk_masks = bool(places)

    def _launch_chunks(self, chunks: list[PrefillChunk]) -> LaunchedGroup | None:
        """None if no chunk draws."""
        num_rows = sum(chunk.num_tokens for chunk in chunks)
        drawing = [chunk.lane for chunk in chunks if chunk.is_last]
        size = self._chunk_sizes[bisect.bisect_left(self._chunk_sizes, num_rows)]
        step = self._prefill[size, self._lanes.is_all_greedy(drawing)]
        step.load(chunks)
        self._load_chunk_masks(drawing)
        self._launcher(step)()
        return self._collect(drawing, step) if drawing else None

    def _path_logprobs(self, lanes: Sequence[int], result_BR: Tensor) -> PathLogprobs | None:
        """Of the tokens just drawn. Not part of the captured step: only lanes that ask for them pay, and for their paths alone."""
        places, num_top = self._lanes.with_logprobs(lanes)
        if not places:
            return None
        num_levels = result_BR.shape[1] - NUM_RESULT_COLUMNS
        place_b, lane_b = self._lanes.upload(np.array([places, [lanes[place] for place in places]], dtype=np.int64))
        hidden_bLE = self._parts.path_hidden_PLE[lane_b, :num_levels]
        token_bL = result_BR[place_b, :num_levels].clamp(min=0)
        hidden_RE, token_R = hidden_bLE.flatten(0, 1), token_bL.flatten()
        rows = logprobs_of_hidden(hidden_RE, token_R, num_top, project=self._parts.model.project, top_k=topk_rows)
        return PathLogprobs(places, num_levels, to_host(rows))

    def _load_lanes(self, size: int, lanes: list[int]) -> None:
        if self._loaded.get(size) != lanes:
            self._loaded[size] = list(lanes)
            padding = [self._lanes.null_lane] * (size - len(lanes))
            self._lane_inputs[size].copy_(self._lanes.index([*lanes, *padding]))

    def _bucket(self, group: DecodeGroup) -> int:
        return self._sizes[bisect.bisect_left(self._sizes, len(group.lanes))]

    def _launcher(self, step: DecodeStep | PrefillStep) -> Callable[[], None]:
        """The step's graph, or the step itself where it was not captured."""
        return self._replay.get(step, step)

    def _collect(self, lanes: Sequence[int], step: DecodeStep | PrefillStep) -> LaunchedGroup:
        """Start the copy of the lanes' result rows; the step's own buffer is free for its next launch behind it."""
        result_BR = step.result_BR
        host_BR = torch.empty(len(lanes), result_BR.shape[1], dtype=torch.int64, pin_memory=self._is_cuda)
        host_BR.copy_(result_BR[: len(lanes)], non_blocking=True)
        hosts = [self._lanes.host[lane] for lane in lanes]
        return LaunchedGroup(lanes, hosts, step.tree, host_BR, self._path_logprobs(lanes, result_BR))

    def _seconds(self, run: Callable[[], object], *, before: Callable[[], object] | None = None) -> float:
        """Mean of a few runs. before: what the device does before each, not timed."""
        run()
        if not self._is_cuda:
            start_s = time.perf_counter()
            run()
            return time.perf_counter() - start_s
        events = [(new_event(enable_timing=True), new_event(enable_timing=True)) for _ in range(_NUM_TIMED)]
        for start, end in events:
            if before is not None:
                before()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in events) / 1e3 / _NUM_TIMED


def _launches(chunks: Sequence[PrefillChunk], max_rows: int) -> Iterator[list[PrefillChunk]]:
    """The chunks in as few launches as hold them."""
    launch: list[PrefillChunk] = []
    num_rows = 0
    for chunk in chunks:
        if launch and (len(launch) == MAX_CHUNKS or num_rows + chunk.num_tokens > max_rows):
            yield launch
            launch, num_rows = [], 0
        launch.append(chunk)
        num_rows += chunk.num_tokens
    if launch:
        yield launch


def _num_rows(step: DecodeStep | PrefillStep) -> int:
    return step.lane_B.shape[0] * step.tree.num_nodes if isinstance(step, DecodeStep) else step.num_rows
