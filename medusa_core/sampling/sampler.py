"""From logits to tokens, row by row: penalties and biases, banned ids, temperature, top-k, top-p, min-p, position-keyed noise.

Every row is processed as if it were alone, so a token never depends on what it was batched with.

Shapes: R rows · V vocabulary · C candidates · W stop ids per row (-1 = none).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.sampling.noise import gumbel
from medusa_core.sampling.penalties import PenaltyRows, penalize

# Top-p looks at this many candidates first; only rows whose nucleus is wider are sorted in full.
_NUCLEUS_CANDIDATES = 512
# Smaller temperatures would overflow logits to infinity, and infinities are all alike. At this one noise decides exact ties only.
_MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRows:
    """Parameters of R rows as tensors, and what the host knows about all of them so that unused filters cost nothing.

    temperature_R (0 = greedy), top_p_R, min_p_R: float32. top_k_R (0 = off), min_tokens_R, key_R: int64. stop_ids_RW: int64.
    penalties: None where no row has any. epsilon_R (0 = off), delta_R: float32, of typical acceptance (speculation/typical.py).
    is_all_greedy, has_...: whether any row needs the step; may be True needlessly.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    min_tokens_R: Tensor
    stop_ids_RW: Tensor
    key_R: Tensor
    epsilon_R: Tensor
    delta_R: Tensor
    is_all_greedy: bool
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool
    has_min_tokens: bool
    has_typical: bool = False
    penalties: PenaltyRows | None = None

    def take(self, rows_r: Tensor) -> SamplingRows:
        """The same parameters for a selection of rows."""
        tensors = {
            f.name: getattr(self, f.name)[rows_r] for f in dataclasses.fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        penalties = None if self.penalties is None else self.penalties.take(rows_r)
        return dataclasses.replace(self, **tensors, penalties=penalties)


def draw(logits_RV: Tensor, rows: SamplingRows, index_R: Tensor) -> Tensor:
    """One token id per row, int64 [R].

    Args:
        logits_RV: float32; not modified.
        index_R: int64, index of the token drawn in its output (0 = first after the prompt).
    """
    logits_RV = process(logits_RV, rows, index_R)
    if rows.is_all_greedy:
        return logits_RV.argmax(dim=-1)
    scaled_RV = temper(logits_RV, rows)
    threshold_R1 = filter_threshold(scaled_RV, rows)
    token_ids_V = torch.arange(logits_RV.shape[1], dtype=torch.int32, device=logits_RV.device)
    noise_RV = gumbel(rows.key_R, index_R, token_ids_V)
    noise_RV.masked_fill_((rows.temperature_R == 0).unsqueeze(1), 0.0)
    scores_RV = noise_RV.add_(scaled_RV)
    if threshold_R1 is not None:
        scores_RV.masked_fill_(scaled_RV < threshold_R1, -torch.inf)
    return scores_RV.argmax(dim=-1)


def process(logits_RV: Tensor, rows: SamplingRows, index_R: Tensor) -> Tensor:
    """What is done to logits before temperature: penalties, biases, bans. The logits themselves where there is none of it."""
    if rows.penalties is not None:
        logits_RV = penalize(logits_RV, rows.penalties)
    return ban_stop_ids(logits_RV, rows, index_R) if rows.has_min_tokens else logits_RV


def temper(logits_RV: Tensor, rows: SamplingRows) -> Tensor:
    """Divided by the temperature; greedy rows by 1."""
    temperature_R = torch.where(rows.temperature_R == 0, 1.0, rows.temperature_R.clamp(min=_MIN_TEMPERATURE))
    return logits_RV / temperature_R.unsqueeze(1)


def ban_stop_ids(logits_RV: Tensor, rows: SamplingRows, index_R: Tensor) -> Tensor:
    """A copy in which rows that have not reached `min_tokens` cannot draw EOS or a stop id."""
    is_banned_RW = (index_R < rows.min_tokens_R).unsqueeze(1) & (rows.stop_ids_RW >= 0)
    penalty_RW = torch.where(is_banned_RW, -torch.inf, 0.0)
    # padding points at id 0 and adds 0
    return logits_RV.scatter_add(1, rows.stop_ids_RW.clamp(min=0), penalty_RW)


def filter_threshold(scaled_RV: Tensor, rows: SamplingRows) -> Tensor | None:
    """The smallest scaled logit that top-k, then top-p, then min-p keep; float32 [R, 1], or None if no filter is on.

    A threshold rather than a set of ids: ties at the edge are all kept, in any order of evaluation.
    """
    if not (rows.has_top_k or rows.has_top_p or rows.has_min_p):
        return None
    max_R1 = scaled_RV.amax(dim=-1, keepdim=True)
    threshold_R1 = torch.full_like(max_R1, -torch.inf)
    if rows.has_top_k:
        threshold_R1 = torch.maximum(threshold_R1, _top_k_threshold(scaled_RV, rows.top_k_R))
    if rows.has_top_p:
        threshold_R1 = torch.maximum(threshold_R1, _top_p_threshold(scaled_RV, threshold_R1, rows.top_p_R))
    if rows.has_min_p:
        # p >= min_p * p_max, in logits; log(0) = -inf switches it off
        threshold_R1 = torch.maximum(threshold_R1, max_R1 + rows.min_p_R.log().unsqueeze(1))
    # rounding must never filter out the most likely token
    return torch.minimum(threshold_R1, max_R1)


def _top_k_threshold(scaled_RV: Tensor, top_k_R: Tensor) -> Tensor:
    num_kept_R = top_k_R.clamp(max=scaled_RV.shape[1])
    sorted_RC = scaled_RV.topk(max(int(num_kept_R.max()), 1), dim=-1).values
    kth_R1 = sorted_RC.gather(1, (num_kept_R - 1).clamp(min=0).unsqueeze(1))
    return torch.where((top_k_R > 0).unsqueeze(1), kth_R1, -torch.inf)


def _top_p_threshold(scaled_RV: Tensor, threshold_R1: Tensor, top_p_R: Tensor) -> Tensor:
    """Logit of the last token of the smallest set of most likely tokens whose probability reaches top_p."""
    kept_RV = scaled_RV.masked_fill(scaled_RV < threshold_R1, -torch.inf)
    log_norm_R1 = kept_RV.logsumexp(dim=-1, keepdim=True)
    num_candidates = min(_NUCLEUS_CANDIDATES, kept_RV.shape[1])
    sorted_RC = kept_RV.topk(num_candidates, dim=-1).values
    edge_R1, is_reached_R1 = _nucleus_edge(sorted_RC, log_norm_R1, top_p_R)
    wide = ((~is_reached_R1.squeeze(1)) & (top_p_R < 1.0)).nonzero().squeeze(1)
    if wide.numel() > 0:
        sorted_rV = kept_RV[wide].sort(dim=-1, descending=True).values
        edge_R1[wide], _ = _nucleus_edge(sorted_rV, log_norm_R1[wide], top_p_R[wide])
    return torch.where((top_p_R < 1.0).unsqueeze(1), edge_R1, -torch.inf)


def _nucleus_edge(sorted_RC: Tensor, log_norm_R1: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """(logit at which the running probability first reaches top_p, whether it does within the C columns); both [R, 1]."""
    cumulative_RC = (sorted_RC - log_norm_R1).exp().cumsum(dim=-1)
    is_inside_RC = cumulative_RC < top_p_R.unsqueeze(1)
    edge_idx_R1 = is_inside_RC.sum(dim=-1, keepdim=True)
    is_reached_R1 = edge_idx_R1 < sorted_RC.shape[1]
    return sorted_RC.gather(1, edge_idx_R1.clamp(max=sorted_RC.shape[1] - 1)), is_reached_R1
