"""Log-probabilities of tokens under the model's own distribution: before penalties, biases, temperature and filters.

Shapes: R rows · V vocabulary · C alternatives · E hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# Rows whose logits are in memory at once, of a long prompt or many lanes.
_MAX_ROWS = 32
# Of a logit on the way to the best ones: itself, its bits, and keys in the making.
_LOGIT_BYTES = 40
_MAX_ID = 2**31 - 1

# Logits, float32 [R, V], and C to ids of the C largest of each row, int64 [R, C]: best first, the lowest id first among equals.
TopK: TypeAlias = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """logprob_R: of the row's token, float32. top_ids_RC: the most likely tokens, best first and the lowest id among equals,
    int64. top_logprobs_RC: float32."""

    logprob_R: Tensor
    top_ids_RC: Tensor
    top_logprobs_RC: Tensor


def workspace_bytes(vocab_size: int) -> int:
    """Memory that `logprobs_of_hidden` takes for a while."""
    return _MAX_ROWS * vocab_size * _LOGIT_BYTES


def top_ids(logits_RV: Tensor, num_top: int) -> Tensor:
    """`TopK` in torch."""
    # As integers that order like (logit, -id): which of equal logits a plain top-k returns is not defined.
    # Adding 0 makes -0.0 the 0.0 that it equals.
    bits_RV = (logits_RV + 0.0).view(torch.int32)
    ordered_RV = bits_RV ^ ((bits_RV >> 31) & _MAX_ID)
    id_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return _MAX_ID - (((ordered_RV.long() << 32) | (_MAX_ID - id_V)).topk(num_top, dim=-1).values & 0xFFFFFFFF)


def token_logprobs(logits_RV: Tensor, token_R: Tensor, num_top: int, *, top_k: TopK = top_ids) -> LogprobRows:
    """logits_RV: float32. token_R: int64. num_top: C, cut to V."""
    log_norm_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    logprob_R = (logits_RV.gather(1, token_R.unsqueeze(1)) - log_norm_R1).squeeze(1)
    num_top = min(num_top, logits_RV.shape[1])
    top_ids_RC = top_k(logits_RV, num_top) if num_top > 0 else token_R.new_empty(token_R.shape[0], 0)
    return LogprobRows(logprob_R, top_ids_RC, logits_RV.gather(1, top_ids_RC) - log_norm_R1)


def logprobs_of_hidden(
    hidden_RE: Tensor, token_R: Tensor, num_top: int, *, project: Callable[[Tensor], Tensor], top_k: TopK = top_ids
) -> LogprobRows:
    """As `token_logprobs`, from hidden states, a few rows at a time. project: hidden states to logits, float32."""
    parts = [
        token_logprobs(project(rows_rE), token_r, num_top, top_k=top_k)
        for rows_rE, token_r in zip(torch.split(hidden_RE, _MAX_ROWS), torch.split(token_R, _MAX_ROWS), strict=True)
    ]
    return LogprobRows(
        torch.cat([part.logprob_R for part in parts]),
        torch.cat([part.top_ids_RC for part in parts]),
        torch.cat([part.top_logprobs_RC for part in parts]),
    )
