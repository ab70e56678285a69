"""Executes plans: one packed forward pass per step, then verification and commit over lane state.

The decode part reads and writes lane state only; nothing in it needs a value on the host, so a step can be launched before the
previous one's result has been read. `submit` launches, `PendingResult.result` waits.

Shapes: B lanes of a group · N nodes · T packed tokens · L levels · V vocabulary · E hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medusa_core.attention.context import AttentionContext, PagedContext
from medusa_core.attention.segments import AttentionBackend, Segment
from medusa_core.grammar.lanes import GrammarLanes
from medusa_core.plan import DecodeGroup, LaneResult, PrefillChunk, StepPlan, StepResult
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.lanes import HostLane, LaneState
from medusa_core.runtime.logprobs import ChunkLogprobs, PathLogprobs, chunk_logprobs, to_host
from medusa_core.runtime.results import lane_result
from medusa_core.sampling.logprobs import token_logprobs
from medusa_core.sampling.token_mask import mask_tokens_
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.drafter import Drafter, draft_tree
from medusa_core.speculation.lookup import lookup_tokens
from medusa_core.speculation.verify import Walk, credited_nodes, cut_walk, walk_tree
from medusa_core.tree.topology import TreeTopology


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceModel:
    """The model as the runner uses it.

    forward: (token_ids_T, position_ids_T, context) -> post-norm hidden_TE. project: hidden_TE -> logits_TV float32.
    drafter: None without heads, and no tree has nodes for them. best_token: hidden_TE -> the token of the
    largest logit, the lowest id among equals, int64 [T], where there is a shorter way to it than `project`.
    """

    forward: Callable[[Tensor, Tensor, AttentionContext], Tensor]
    project: Callable[[Tensor], Tensor]
    drafter: Drafter | None
    eos_token_ids: tuple[int, ...]
    device: torch.device
    best_token: Callable[[Tensor], Tensor] | None = None


@dataclass(slots=True)
class _Rows:
    """Rows of one group or chunk in the packed step. `lanes` share a tree; `tokens_BN` are its tokens.

    draft_BN: these tokens on the host, of what draws under a grammar; of a chunk, the one node of its draw. Else None.
    """

    lanes: list[int]
    index_B: Tensor
    segment: Segment
    tokens_BN: Tensor
    tree: DeviceTree
    is_prefill: bool
    has_draw: bool
    draft_BN: np.ndarray | None = None


@dataclass(slots=True)
class _GroupResult:
    """Device tensors of one verified group, read back in `result`."""

    lanes: list[int]
    hosts: list[HostLane]
    tree: DeviceTree
    token_ids_BL: Tensor
    length_B: Tensor
    num_kept_B: Tensor
    finish_code_B: Tensor
    credit_B: Tensor
    logprobs: PathLogprobs | None


class PendingResult:
    """A launched step (plan.PendingStep)."""

    def __init__(self, step_id: int, groups: list[_GroupResult], chunks: list[ChunkLogprobs], grammars: GrammarLanes) -> None:
        self._step_id = step_id
        self._groups = groups
        self._chunks = chunks
        self._grammars = grammars

    def result(self) -> StepResult:
        """Wait for the device and read the step back."""
        return StepResult(
            step_id=self._step_id,
            lanes=[self._grammars.take(lane) for group in self._groups for lane in _read_group(group)],
            prompt_logprobs=[chunk.read() for chunk in self._chunks],
        )


class ModelRunner:
    """plan.Runner over a transformers model."""

    def __init__(
        self,
        *,
        model: DeviceModel,
        topology: TreeTopology,
        kv_store: KVStore,
        lanes: LaneState,
        attention: AttentionBackend,
        grammars: GrammarLanes,
    ) -> None:
        self._model = model
        self._grammars = grammars
        self._topology = topology
        self._trees: dict[int, DeviceTree] = {}
        self._kv = kv_store
        self._lanes = lanes
        self._attention = attention

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingResult:
        """Apply lane changes, run the step's rows, launch verification and commit."""
        self._lanes.apply(plan, self._model.eos_token_ids)
        self._grammars.apply(plan)
        if not plan.has_rows:
            return PendingResult(plan.step_id, [], [], self._grammars)
        rows = self._pack(plan)
        hidden_TE = self._forward(rows)
        chunks = chunk_logprobs(self._lanes, plan.chunks, hidden_TE, self._model.project)
        drawing = [part for part in rows if part.has_draw]
        if not drawing:
            return PendingResult(plan.step_id, [], chunks, self._grammars)
        verified_hidden = [_verified_rows(part, hidden_TE) for part in drawing]
        logits_TV = self._model.project(torch.cat([hidden.flatten(0, 1) for hidden in verified_hidden]))
        groups, start = [], 0
        for part, hidden_BNE in zip(drawing, verified_hidden, strict=True):
            num_rows = hidden_BNE.shape[0] * hidden_BNE.shape[1]
            logits_BNV = logits_TV[start : start + num_rows].view(*hidden_BNE.shape[:2], -1)
            groups.append(self._verify(part, hidden_BNE, logits_BNV))
            start += num_rows
        return PendingResult(plan.step_id, groups, chunks, self._grammars)

    def _pack(self, plan: StepPlan) -> list[_Rows]:
        rows: list[_Rows] = []
        start_row = 0
        for chunk in plan.chunks:
            rows.append(self._pack_chunk(chunk, start_row))
            start_row += rows[-1].segment.num_rows
        for group in plan.decode_groups:
            rows.append(self._pack_group(group, start_row))
            start_row += rows[-1].segment.num_rows
        return rows

    def _pack_chunk(self, chunk: PrefillChunk, start_row: int) -> _Rows:
        tree = DeviceTree.causal(chunk.num_tokens, self._model.device)
        base_B = torch.tensor([chunk.start], dtype=torch.int64, device=self._model.device)
        tokens_BN = self._lanes.tokens_PL[chunk.lane, chunk.start : chunk.start + chunk.num_tokens].unsqueeze(0)
        lanes = [chunk.lane]
        index_B = self._lanes.index(lanes)
        segment = self._segment(lanes, index_B, base_B, tree, start_row)
        draft_BN = np.zeros((1, 1), dtype=np.int64) if chunk.is_last and chunk.lane in self._grammars else None
        return _Rows(lanes, index_B, segment, tokens_BN, tree, True, chunk.is_last, draft_BN)

    def _pack_group(self, group: DecodeGroup, start_row: int) -> _Rows:
        tree = self._tree(group.num_nodes)
        index_B = self._lanes.index(group.lanes)
        base_B = self._lanes.num_known_P[index_B] - 1
        root_B = self._lanes.tokens_PL[index_B, base_B]
        lookup_BD = None
        if tree.lookup_depth:
            prediction = self._lanes.prediction_rows(group.lanes, index_B)
            lookup_BD = lookup_tokens(self._lanes.tokens_PL, index_B, base_B + 1, tree.lookup_depth, prediction)
        tokens_BN = draft_tree(self._model.drafter, self._lanes.hidden_PE[index_B], root_B, tree, lookup_BD)
        segment = self._segment(group.lanes, index_B, base_B, tree, start_row)
        # The host waits for the draft, but not for the forward pass behind it, during which it makes the masks.
        draft_BN = tokens_BN.cpu().numpy() if group.has_grammar else None
        return _Rows(group.lanes, index_B, segment, tokens_BN, tree, False, True, draft_BN)

    def _segment(self, lanes: Sequence[int], index_B: Tensor, base_B: Tensor, tree: DeviceTree, start_row: int) -> Segment:
        context_slots_BC = self._kv.context_slots(self._lanes.block_table(lanes, index_B))
        return Segment(start_row, base_B, tree.depth_N, tree.ancestor_mask_NN, context_slots_BC, self._kv.block_size)

    def _forward(self, rows: list[_Rows]) -> Tensor:
        context = PagedContext.create(self._kv, [part.segment for part in rows], self._attention)
        token_ids_T = torch.cat([part.tokens_BN.flatten() for part in rows])
        # A tree may reach beyond the context, where models with learned positions have none. No token drawn there is ever kept.
        position_ids_T = context.position_ids().clamp(max=self._lanes.max_model_len - 1)
        return self._model.forward(token_ids_T, position_ids_T, context)

    def _path_logprobs(self, lanes: list[int], walk: Walk, logits_BNV: Tensor) -> PathLogprobs | None:
        places, num_top = self._lanes.with_logprobs(lanes)
        if not places:
            return None
        place_b = torch.tensor(places, device=logits_BNV.device)
        logits_bLV = logits_BNV[place_b.unsqueeze(1), walk.node_BL[place_b]]
        token_bL = walk.token_ids_BL[place_b].clamp(min=0)
        rows = token_logprobs(logits_bLV.flatten(0, 1), token_bL.flatten(), num_top)
        return PathLogprobs(places, token_bL.shape[1], to_host(rows))

    def _allowed(self, part: _Rows, logits_BNV: Tensor) -> Tensor:
        """The logits that may be drawn from; in place, unless someone reads the others later. Takes nodes without a mask out of the
        tree."""
        if part.draft_BN is None:
            return logits_BNV
        # smaller trees are the first nodes of larger ones
        parents = self._topology.parents[: part.draft_BN.shape[1]]
        masks = self._grammars.fill(part.lanes, part.draft_BN, parents)
        # no token is -1, so nobody descends there
        part.tokens_BN = torch.where(self._lanes.upload(masks.row_BN < 0), -1, part.tokens_BN)
        allowed_BNV = logits_BNV.clone() if self._lanes.with_logprobs(part.lanes)[0] else logits_BNV
        mask_tokens_(allowed_BNV.flatten(0, 1), self._lanes.upload(masks.mask_KW[masks.row_BN.clip(0).ravel()]))
        return allowed_BNV

    def _verify(self, part: _Rows, hidden_BNE: Tensor, logits_BNV: Tensor) -> _GroupResult:
        lanes, state = part.lanes, self._lanes
        # A last chunk draws from its last row only: a tree of one node.
        tree = self._tree(1) if part.is_prefill else part.tree
        index_B = part.index_B
        known_B = state.num_known_P[index_B]
        allowed_BNV = self._allowed(part, logits_BNV)
        walk = walk_tree(
            allowed_BNV,
            part.tokens_BN[:, -tree.num_nodes :],
            tree,
            state.sampling_rows(lanes, index_B),
            known_B - state.num_prompt_P[index_B],
        )
        room_B = state.max_total_P[index_B] - known_B
        kept_B, code_B = cut_walk(walk, state.stop_ids_PW[index_B], room_B, state.is_finished_P[index_B] > 0)
        if tree.num_nodes > 1:
            self._commit_path(part.segment, walk.node_BL, kept_B)
        level_L = torch.arange(walk.token_ids_BL.shape[1], device=known_B.device)
        column_BL = torch.where(level_L < kept_B.unsqueeze(1), known_B.unsqueeze(1) + level_L, state.max_model_len)
        state.tokens_PL[index_B.unsqueeze(1), column_BL] = walk.token_ids_BL
        state.penalties.count(index_B, walk.token_ids_BL, kept_B)
        # The new root was drawn at the last kept level's node; a finished lane keeps nothing and is never drafted for again.
        node_B = walk.node_BL.gather(1, (kept_B - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        state.hidden_PE[index_B] = hidden_BNE[torch.arange(len(lanes), device=node_B.device), node_B]
        state.num_known_P[index_B] = known_B + kept_B
        state.is_finished_P[index_B] |= (code_B > 0).to(torch.int64)
        hosts = [state.host[lane] for lane in lanes]
        logprobs = self._path_logprobs(lanes, walk, logits_BNV)
        credit_B = credited_nodes(walk, kept_B)
        return _GroupResult(lanes, hosts, tree, walk.token_ids_BL, walk.length_B, kept_B, code_B, credit_B, logprobs)

    def _commit_path(self, segment: Segment, node_BL: Tensor, kept_B: Tensor) -> None:
        """Move the K/V of accepted nodes to the slots right behind the root. The last kept token is the new root: not cached."""
        level_L = torch.arange(node_BL.shape[1], device=node_BL.device)
        has_move_BL = (level_L < kept_B.unsqueeze(1)) & (node_BL != level_L)
        if node_BL.device.type == "cpu" and not bool(has_move_BL.any()):
            return
        base_B1 = segment.base_B.unsqueeze(1)
        slots_BC = segment.context_slots_BC
        limit = slots_BC.shape[1] - 1
        source_BL = slots_BC.gather(1, (base_B1 + node_BL).clamp(max=limit))
        target_BL = slots_BC.gather(1, (base_B1 + level_L).clamp(max=limit))
        source_BL = torch.where(has_move_BL, source_BL, self._kv.spare_slot)
        target_BL = torch.where(has_move_BL, target_BL, self._kv.spare_slot)
        self._kv.move(source_BL.flatten(), target_BL.flatten())

    def _tree(self, num_nodes: int) -> DeviceTree:
        if num_nodes not in self._trees:
            self._trees[num_nodes] = DeviceTree.create(self._topology.prefix(num_nodes), self._model.device)
        return self._trees[num_nodes]


def _verified_rows(part: _Rows, hidden_TE: Tensor) -> Tensor:
    """Hidden states of the rows that tokens are drawn from, [B, N, E]: a chunk's last row, all nodes of a decode group."""
    segment = part.segment
    end = segment.start_row + segment.num_rows
    start = end - 1 if part.is_prefill else segment.start_row
    return hidden_TE[start:end].view(segment.num_lanes, -1, hidden_TE.shape[-1])


def _read_group(group: _GroupResult) -> list[LaneResult]:
    columns = (group.token_ids_BL, group.length_B, group.num_kept_B, group.finish_code_B, group.credit_B)
    rows = zip(group.lanes, group.hosts, *(column.tolist() for column in columns), strict=True)
    logprobs = group.logprobs.by_place() if group.logprobs is not None else {}
    return [lane_result(lane, host, group.tree, logprobs.get(place, ()), *row) for place, (lane, host, *row) in enumerate(rows)]
