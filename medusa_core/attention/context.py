"""The object that travels through a model's forward pass and gives its attention layers the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medusa_core.attention.segments import AttentionBackend, AttentionParams, Segment

# (KV heads, key dim, value dim) of a layer
LayerShape = tuple[int, int, int]


class LayerCache(Protocol):
    """Where the keys and values of each layer live."""

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(key_slots_SGD, value_slots_SGD) of one layer; views that are written in place."""
        ...


class AttentionContext(Protocol):
    """What the attention hook calls in each layer."""

    def attend(self, layer_idx: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, params: AttentionParams) -> Tensor:
        """[T, H, Dv]."""
        ...


@dataclass(slots=True)
class PagedContext:
    """One packed step: writes the step's keys and values to their slots, then attends segment by segment.

    slots_T: int64, where each row's key and value go.
    """

    cache: LayerCache
    segments: Sequence[Segment]
    backend: AttentionBackend
    slots_T: Tensor

    @classmethod
    def create(cls, cache: LayerCache, segments: Sequence[Segment], backend: AttentionBackend) -> PagedContext:
        return cls(cache, segments, backend, torch.cat([segment.write_slots() for segment in segments]))

    def position_ids(self) -> Tensor:
        """int64 [T]."""
        return torch.cat([segment.position_ids() for segment in self.segments])

    def attend(self, layer_idx: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, params: AttentionParams) -> Tensor:
        """See AttentionContext."""
        key_slots_SGD, value_slots_SGD = self.cache.layer(layer_idx)
        key_slots_SGD.index_copy_(0, self.slots_T, key_TGD)
        value_slots_SGD.index_copy_(0, self.slots_T, value_TGD)
        return self.attend_written(layer_idx, query_THD, params)

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See LayerCache."""
        return self.cache.layer(layer_idx)

    def attend_written(self, layer_idx: int, query_THD: Tensor, params: AttentionParams) -> Tensor:
        """As `attend`, for a layer that has written its keys and values itself."""
        key_slots_SGD, value_slots_SGD = self.cache.layer(layer_idx)
        outs = []
        for segment in self.segments:
            rows = slice(segment.start_row, segment.start_row + segment.num_rows)
            query_BNHD = query_THD[rows].reshape(segment.num_lanes, segment.num_queries, *query_THD.shape[1:])
            outs.append(self.backend.attend(query_BNHD, key_slots_SGD, value_slots_SGD, segment, params).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
