"""Log-probabilities on their way to the host.

Shapes: R rows · C alternatives · T packed rows · E hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.outputs import TokenLogprob
from medusa_core.plan import PrefillChunk, PromptLogprobs
from medusa_core.runtime.lanes import LaneState
from medusa_core.sampling.logprobs import LogprobRows, TopK, logprobs_of_hidden, top_ids


def to_host(rows: LogprobRows) -> LogprobRows:
    """Copies in page-locked memory that are under way, where the rows are on a GPU; else the rows."""
    return LogprobRows(_to_host(rows.logprob_R), _to_host(rows.top_ids_RC), _to_host(rows.top_logprobs_RC))


@dataclass(frozen=True, slots=True)
class PathLogprobs:
    """Of the tokens that a group drew. places: which lanes of the group there are rows of, in order, `num_levels` each."""

    places: list[int]
    num_levels: int
    rows: LogprobRows

    def by_place(self) -> dict[int, list[TokenLogprob]]:
        """Of each level of each lane. Waits for nothing: the copies have arrived."""
        entries = _entries(self.rows)
        return {
            place: entries[number * self.num_levels : (number + 1) * self.num_levels] for number, place in enumerate(self.places)
        }


@dataclass(frozen=True, slots=True)
class ChunkLogprobs:
    """Of the prompt tokens behind those of a chunk that starts at `start`."""

    uid: int
    start: int
    rows: LogprobRows

    def read(self) -> PromptLogprobs:
        """Waits for nothing: the copies have arrived."""
        return PromptLogprobs(uid=self.uid, start=self.start, logprobs=_entries(self.rows))


def chunk_logprobs(
    lanes: LaneState,
    chunks: Sequence[PrefillChunk],
    hidden_TE: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    top_k: TopK = top_ids,
) -> list[ChunkLogprobs]:
    """Of the chunks whose lanes ask for them. hidden_TE: of all rows of the chunks, which come first, in order."""
    reads, row = [], 0
    for chunk in chunks:
        targets = lanes.prompt_targets(chunk)
        if targets is not None:
            target_n, num_top = targets
            hidden_nE = hidden_TE[row : row + target_n.shape[0]]
            rows = logprobs_of_hidden(hidden_nE, target_n, num_top, project=project, top_k=top_k)
            reads.append(ChunkLogprobs(lanes.host[chunk.lane].uid, chunk.start, to_host(rows)))
        row += chunk.num_tokens
    return reads


def cut(logprobs: Sequence[TokenLogprob], num_tokens: int, num_top: int | None) -> list[TokenLogprob]:
    """The first tokens' entries, with as many alternatives as were asked for; none where None were."""
    if num_top is None:
        return []
    return [TokenLogprob(entry.logprob, entry.top_ids[:num_top], entry.top_logprobs[:num_top]) for entry in logprobs[:num_tokens]]


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _entries(rows: LogprobRows) -> list[TokenLogprob]:
    columns = (rows.logprob_R.tolist(), rows.top_ids_RC.tolist(), rows.top_logprobs_RC.tolist())
    return [TokenLogprob(*row) for row in zip(*columns, strict=True)]
