"""How a packed step is described to an attention backend.

A step is a list of T query tokens cut into segments. A segment holds B lanes with N queries each. Query i of a lane sees every
committed slot (slot < base) and, among the N slots written in this step (base + j), those in its row of `ancestor_mask_NN`. That
covers all we run: a prompt chunk is one lane with a lower-triangular mask, plain decoding a 1x1 mask, a tree its ancestors.

Shapes: B lanes · T packed query tokens · N queries per lane · X block-table width · C context slots gathered (a bound known to the
host) · H/G query/KV heads · D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class Segment:
    """B lanes with N queries each, rows [start_row, start_row + B * N) of the packed step.

    base_B: int64, committed tokens of each lane, i.e. position of its first query.
    depth_N: int64, position of query i is base + depth[i].
    ancestor_mask_NN: bool, True = query i may see the slot of query j; the diagonal is True.
    context_slots_BC: int64, slot of each context position; positions past the lane's blocks point at a spare slot and are
        masked, because they lie at or beyond base + N.
    block_size: context positions come in runs of so many neighbouring slots that start at a multiple of it.
    """

    start_row: int
    base_B: Tensor
    depth_N: Tensor
    ancestor_mask_NN: Tensor
    context_slots_BC: Tensor
    block_size: int = 1
    # by (window, repeats): built on first use, shared by all layers of a step
    mask_cache: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)
    # int64 [B * C / block_size]: block of each run, for gathering whole blocks instead of slots
    context_blocks: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.context_blocks = self.context_slots_BC[:, :: self.block_size].flatten() // self.block_size

    @property
    def num_lanes(self) -> int:
        return self.base_B.shape[0]

    @property
    def num_queries(self) -> int:
        return self.depth_N.shape[0]

    @property
    def num_rows(self) -> int:
        return self.num_lanes * self.num_queries

    def position_ids(self) -> Tensor:
        """int64 [B * N]."""
        return (self.base_B.unsqueeze(1) + self.depth_N).flatten()

    def write_slots(self) -> Tensor:
        """Slots that the K/V of this segment's rows are written to, int64 [B * N]."""
        offsets_N = torch.arange(self.num_queries, device=self.base_B.device)
        return self.context_slots_BC.gather(1, self.base_B.unsqueeze(1) + offsets_N).flatten()

    def visible_mask(self, window: int | None, num_repeats: int) -> Tensor:
        """bool [B, 1, num_repeats * N, C], True = may attend.

        Args:
            window: a key is visible only if query position - key position < window; None = no limit. By position, not by
                slot: siblings of a tree share a position.
            num_repeats: rows are repeated for query heads that share a KV head, head-major.
        """
        key = (window, num_repeats)
        if key not in self.mask_cache:
            mask_BNC = self._mask(window)
            self.mask_cache[key] = mask_BNC.repeat(1, num_repeats, 1).unsqueeze(1)
        return self.mask_cache[key]

    def _mask(self, window: int | None) -> Tensor:
        num_context = self.context_slots_BC.shape[1]
        slot_C = torch.arange(num_context, device=self.base_B.device)
        offset_BC = slot_C - self.base_B.unsqueeze(1)
        is_in_step_BC = (offset_BC >= 0) & (offset_BC < self.num_queries)
        node_BC = offset_BC.clamp(0, self.num_queries - 1)
        in_step_NBC = self.ancestor_mask_NN[:, node_BC] & is_in_step_BC
        mask_BNC = (in_step_NBC | (offset_BC < 0)).transpose(0, 1)
        if window is not None:
            key_position_BC = torch.where(is_in_step_BC, self.base_B.unsqueeze(1) + self.depth_N[node_BC], slot_C)
            query_position_BN = self.base_B.unsqueeze(1) + self.depth_N
            mask_BNC = mask_BNC & (query_position_BN.unsqueeze(2) - key_position_BC.unsqueeze(1) < window)
        return mask_BNC


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionParams:
    """What a layer asks of its attention: softmax scale, sliding window, logit soft-cap, sink logits [H]."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


class AttentionBackend(Protocol):
    """Attends one segment's queries to its lanes' cached keys and values."""

    def attend(
        self, query_BNHD: Tensor, key_slots_SGD: Tensor, value_slots_SGD: Tensor, segment: Segment, params: AttentionParams
    ) -> Tensor:
        """[B, N, H, Dv]. The K/V of this step are already in the cache; S here is the number of slots of the cache."""
        ...
