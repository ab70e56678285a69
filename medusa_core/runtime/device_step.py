"""A step as a function of lane state: draft, forward, verify, commit, with no value on the host and no shape that depends on data.

That is what lets a step be captured once and replayed (runtime/graph_runner.py). Both kinds of step have fixed sizes and are filled
up with the null lane: a decode step runs B lanes with a tree of N nodes each, a prefill step T rows of prompt chunks, of which up
to C are the last of their prompt and draw a token. The plain twin, with the shapes of each plan, is runtime/runner.py.

Shapes: B lanes of the step · N nodes · T packed rows · C draws of a prefill step · Q query tiles · L levels · E hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medusa_core.attention.kernel_context import BlockTables, chunk_context, tree_context
from medusa_core.kernels.attention import SplitWorkspace
from medusa_core.kernels.kv_cache import commit_path
from medusa_core.kernels.lookup import match_suffixes
from medusa_core.kernels.penalties import penalize_nodes
from medusa_core.kernels.roots import gather_roots
from medusa_core.kernels.sampling import draw_rows
from medusa_core.kernels.token_mask import mask_tokens_
from medusa_core.kernels.topk import argmax_rows
from medusa_core.kernels.tree_step import NUM_RESULT_COLUMNS, pack_trees, walk_trees
from medusa_core.kernels.typical import take_typical_paths
from medusa_core.plan import PrefillChunk
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.lanes import LaneState
from medusa_core.runtime.runner import DeviceModel
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.lookup import MAX_MATCH_LEN


def hidden_stores(lanes: LaneState, num_levels: int, max_chunk_rows: int) -> dict[str, Tensor]:
    """The two stores of `StepParts` that log-probabilities are computed from. num_levels: of the deepest tree, root included.
    max_chunk_rows: most rows of a prefill step."""
    hidden_PE = lanes.hidden_PE
    return {
        "path_hidden_PLE": hidden_PE.new_zeros(hidden_PE.shape[0], num_levels, hidden_PE.shape[1]),
        "chunk_hidden_TE": hidden_PE.new_zeros(max_chunk_rows, hidden_PE.shape[1]),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class StepParts:
    """What all steps of a runner share.

    tile_rows: query rows of one tile of the chunk attention. use_pdl: overlap launches (kernels.support.can_overlap_launches).
    path_hidden_PLE: hidden states that the latest tokens of a lane were drawn from, of lanes that ask for log-probabilities.
    chunk_hidden_TE: those of the latest prefill step.
    """

    model: DeviceModel
    lanes: LaneState
    kv_store: KVStore
    tables: BlockTables
    workspace: SplitWorkspace
    tile_rows: int
    path_hidden_PLE: Tensor
    chunk_hidden_TE: Tensor
    use_pdl: bool

    def draw(
        self,
        hidden_TE: Tensor,
        lane_T: Tensor,
        token_T: Tensor,
        index_T: Tensor,
        tree: DeviceTree,
        *,
        is_greedy: bool,
        bits_TW: Tensor | None = None,
    ) -> Tensor:
        """The token the model draws at each row, int64 [T]. A draw depends on the row's logits, its index and the path to it, so
        all nodes of a tree can be drawn for at once. bits_TW: which tokens may be drawn (kernels.token_mask), where not greedy."""
        if is_greedy and self.model.best_token is not None:
            return self.model.best_token(hidden_TE)
        logits_TV = self.model.project(hidden_TE)
        if is_greedy:
            return argmax_rows(logits_TV)
        lanes, penalties = self.lanes, self.lanes.penalties
        penalize_nodes(
            logits_TV,
            lane_R=lane_T,
            token_R=token_T,
            parent_N=tree.parent_N,
            has_penalties_P=lanes.has_penalties_P,
            repetition_P=lanes.repetition_P,
            frequency_P=lanes.frequency_P,
            presence_P=lanes.presence_P,
            count_PV=penalties.count_PV,
            is_prompt_PV=penalties.is_prompt_PV,
            bias_PV=penalties.bias_PV,
            use_pdl=self.use_pdl,
        )
        if bits_TW is not None:
            mask_tokens_(logits_TV, bits_TW, use_pdl=self.use_pdl)
        drawn_T = draw_rows(
            logits_TV,
            lane_R=lane_T,
            index_R=index_T,
            temperature_P=lanes.temperature_P,
            top_k_P=lanes.top_k_P,
            top_p_P=lanes.top_p_P,
            min_p_P=lanes.min_p_P,
            min_tokens_P=lanes.min_tokens_P,
            stop_ids_PW=lanes.stop_ids_PW,
            key_P=lanes.key_P,
        )
        take_typical_paths(
            drawn_T,
            logits_TV,
            lane_T=lane_T,
            token_T=token_T,
            index_T=index_T,
            parent_N=tree.parent_N,
            depth_N=tree.depth_N,
            max_depth=tree.max_depth,
            temperature_P=lanes.temperature_P,
            epsilon_P=lanes.epsilon_P,
            delta_P=lanes.delta_P,
            min_tokens_P=lanes.min_tokens_P,
            stop_ids_PW=lanes.stop_ids_PW,
            use_pdl=self.use_pdl,
        )
        return drawn_T

    def walk(
        self, lane_B: Tensor, drawn_T: Tensor, token_T: Tensor, hidden_TE: Tensor, tree: DeviceTree, result_BR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See kernels.tree_step.walk_trees."""
        lanes = self.lanes
        return walk_trees(
            lane_B,
            drawn_T,
            token_T,
            hidden_TE,
            parent_N=tree.parent_N,
            rank_N=tree.rank_N,
            num_levels=result_BR.shape[1] - NUM_RESULT_COLUMNS,
            num_known_P=lanes.num_known_P,
            max_total_P=lanes.max_total_P,
            is_finished_P=lanes.is_finished_P,
            stop_ids_PW=lanes.stop_ids_PW,
            tokens_PL=lanes.tokens_PL,
            hidden_PE=lanes.hidden_PE,
            has_logprobs_P=lanes.has_logprobs_P,
            path_hidden_PLE=self.path_hidden_PLE,
            count_PV=lanes.penalties.count_PV,
            block_table_PX=self.tables.table_PX,
            block_size=self.tables.block_size,
            spare_slot=self.tables.spare_slot,
            result_BR=result_BR,
            use_pdl=self.use_pdl,
        )


class TreeRows(NamedTuple):
    """The packed rows of a decode step (kernels.tree_step.pack_trees)."""

    token_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    index_T: Tensor
    lane_T: Tensor
    base_B: Tensor


class DecodeStep:
    """B lanes, N nodes each. Set the lanes, then call it.

    lane_B: int64, the input. result_BR: int64 [B, L + 4], the output (see walk_trees). Both stay where they are.
    """

    def __init__(self, parts: StepParts, lane_B: Tensor, tree: DeviceTree, *, is_greedy: bool) -> None:
        self.tree = tree
        self.lane_B = lane_B
        self.result_BR = lane_B.new_zeros(lane_B.shape[0], tree.max_depth + 1 + NUM_RESULT_COLUMNS)
        self._parts = parts
        self._is_greedy = is_greedy
        drafter = parts.model.drafter
        # without heads, nothing is taken from a list
        self._list_N = tree.parent_N if drafter is None else drafter.lists_of(tree)

    def __call__(self) -> None:
        rows = self.pack()
        self.finish(rows, self.forward(rows), self.lane_B)

    def pack(self) -> TreeRows:
        """Draft."""
        parts, lanes, tree = self._parts, self._parts.lanes, self.tree
        candidates_BRC, match_BJ = self.draft()
        rows = pack_trees(
            self.lane_B,
            candidates_BRC,
            match_BJ,
            list_N=self._list_N,
            depth_N=tree.depth_N,
            rank_N=tree.rank_N,
            num_known_P=lanes.num_known_P,
            num_prompt_P=lanes.num_prompt_P,
            tokens_PL=lanes.tokens_PL,
            block_table_PX=parts.tables.table_PX,
            block_size=parts.tables.block_size,
            spare_slot=parts.tables.spare_slot,
            max_position=lanes.max_model_len - 1,
            first_prediction=lanes.first_prediction,
            use_pdl=parts.use_pdl,
        )
        return TreeRows(*rows)

    def forward(self, rows: TreeRows) -> Tensor:
        """Hidden states of the rows, [T, E]."""
        parts, tree = self._parts, self.tree
        context = tree_context(
            parts.kv_store,
            rows.slot_T,
            parts.tables,
            lane_B=self.lane_B,
            base_B=rows.base_B,
            depth_N=tree.depth_N,
            ancestor_bits_N=tree.ancestor_bits_N,
            workspace=parts.workspace,
            use_pdl=parts.use_pdl,
        )
        return parts.model.forward(rows.token_T, rows.position_T, context)

    def finish(self, rows: TreeRows, hidden_TE: Tensor, lane_B: Tensor, bits_TW: Tensor | None = None) -> None:
        """Draw, walk, commit. lane_B: whose rows they are. bits_TW: see `StepParts.draw`."""
        parts, tree = self._parts, self.tree
        drawn_T = parts.draw(hidden_TE, rows.lane_T, rows.token_T, rows.index_T, tree, is_greedy=self._is_greedy, bits_TW=bits_TW)
        source_BL, target_BL = parts.walk(lane_B, drawn_T, rows.token_T, hidden_TE, tree, self.result_BR)
        if tree.num_nodes > 1:
            for key_YSGD, value_YSGD in parts.kv_store.layer_groups:
                commit_path(key_YSGD, value_YSGD, source_BL, target_BL, use_pdl=parts.use_pdl)

    def draft(self) -> tuple[Tensor | None, Tensor | None]:
        """What heads and text offer every lane: lists of candidates, int64 [B, R, C], and keys of matches, int64 [B, J]; None where
        the tree asks for none."""
        match_BJ = self._match() if self.tree.lookup_depth > 0 else None
        candidates_BRC = self._candidates() if self.tree.head_depth > 0 else None
        return candidates_BRC, match_BJ

    def _match(self) -> Tensor:
        lanes = self._parts.lanes
        return match_suffixes(
            self.lane_B,
            num_known_P=lanes.num_known_P,
            num_prompt_P=lanes.num_prompt_P,
            num_predicted_P=lanes.num_predicted_P,
            tokens_PL=lanes.tokens_PL,
            first_prediction=lanes.first_prediction,
            max_match_len=MAX_MATCH_LEN,
            use_pdl=self._parts.use_pdl,
        )

    def _candidates(self) -> Tensor:
        drafter, lanes = self._parts.model.drafter, self._parts.lanes
        assert drafter is not None  # without heads, no tree has nodes for them
        hidden_BE, root_B = gather_roots(
            self.lane_B,
            num_known_P=lanes.num_known_P,
            tokens_PL=lanes.tokens_PL,
            hidden_PE=lanes.hidden_PE,
            use_pdl=self._parts.use_pdl,
        )
        return drafter(hidden_BE, root_B, self.tree)


class PrefillStep:
    """T rows of prompt chunks, up to C of them last chunks. `load` the chunks, then call it.

    bits_CW: which tokens each last chunk may draw (see `StepParts.draw`), an input too. result_BR: int64 [C, 1 + 4], a row per last
    chunk in the order of the chunks. tree: of a draw, a root alone.
    """

    def __init__(self, parts: StepParts, num_rows: int, bits_CW: Tensor, *, is_greedy: bool) -> None:
        num_draws = bits_CW.shape[0]
        device = parts.model.device
        self.num_rows = num_rows
        self.num_draws = num_draws
        # every chunk may leave one tile half full
        self._num_tiles = -(-num_rows // parts.tile_rows) + num_draws
        self._parts = parts
        self._bits_CW = bits_CW
        self._is_greedy = is_greedy
        self.tree = DeviceTree.causal(1, device)
        self._inputs = torch.zeros(2 * num_rows + 2 * num_draws + 4 * self._num_tiles, dtype=torch.int64, device=device)
        self.result_BR = torch.zeros(num_draws, 1 + NUM_RESULT_COLUMNS, dtype=torch.int64, device=device)
        self.load([])

    def load(self, chunks: Sequence[PrefillChunk]) -> None:
        """Set the chunks: at most C, of at most T tokens together. All that is left is the null lane's."""
        lanes = self._parts.lanes
        lane_T = np.full(self.num_rows, lanes.null_lane, dtype=np.int64)
        position_T = np.zeros(self.num_rows, dtype=np.int64)
        draw_row_C = np.zeros(self.num_draws, dtype=np.int64)
        draw_lane_C = np.full(self.num_draws, lanes.null_lane, dtype=np.int64)
        tiles: list[tuple[int, int, int, int]] = []
        row = num_draws = 0
        for chunk in chunks:
            end = row + chunk.num_tokens
            lane_T[row:end] = chunk.lane
            position_T[row:end] = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            for offset in range(0, chunk.num_tokens, self._parts.tile_rows):
                num_rows = min(self._parts.tile_rows, chunk.num_tokens - offset)
                tiles.append((chunk.lane, row + offset, num_rows, chunk.start + offset))
            if chunk.is_last:
                draw_row_C[num_draws], draw_lane_C[num_draws] = end - 1, chunk.lane
                num_draws += 1
            row = end
        tiles_4Q = np.zeros((4, self._num_tiles), dtype=np.int64)
        tiles_4Q[:, : len(tiles)] = np.array(tiles, dtype=np.int64).reshape(-1, 4).T
        self._inputs.copy_(lanes.upload(np.concatenate([lane_T, position_T, draw_row_C, draw_lane_C, tiles_4Q.ravel()])))

    def __call__(self) -> None:
        parts, lanes, tables = self._parts, self._parts.lanes, self._parts.tables
        sizes = [self.num_rows] * 2 + [self.num_draws] * 2 + [4 * self._num_tiles]
        lane_T, position_T, draw_row_C, draw_lane_C, tiles = torch.split(self._inputs, sizes)
        block_T = tables.table_PX[lane_T, position_T // tables.block_size]
        slot_T = torch.where(block_T < 0, tables.spare_slot, block_T * tables.block_size + position_T % tables.block_size)
        context = chunk_context(
            parts.kv_store, slot_T, tables, tiles_4Q=tiles.to(torch.int32).view(4, -1), tile_rows=parts.tile_rows
        )
        hidden_TE = parts.model.forward(lanes.tokens_PL[lane_T, position_T], position_T, context)
        parts.chunk_hidden_TE[: self.num_rows].copy_(hidden_TE)
        hidden_CE = hidden_TE[draw_row_C]
        index_C = lanes.num_known_P[draw_lane_C] - lanes.num_prompt_P[draw_lane_C]
        # a tree of one node has no drafts on the way, so its token does not matter
        drawn_C = parts.draw(
            hidden_CE, draw_lane_C, draw_row_C, index_C, self.tree, is_greedy=self._is_greedy, bits_TW=self._bits_CW
        )
        parts.walk(draw_lane_C, drawn_C, drawn_C, hidden_CE, self.tree, self.result_BR)
