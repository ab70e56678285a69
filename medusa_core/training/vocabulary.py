"""The draft vocabulary: the tokens that heads may guess, the most frequent ones of the texts they learn from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from medusa_core.training.packing import Row


def choose_draft_vocabulary(rows: Iterable[Row], vocab_size: int, num_tokens: int) -> Tensor | None:
    """Ids of the `num_tokens` most frequent tokens to be learned, int64, increasing; None where that is the whole vocabulary.

    Among equally frequent ones, lower ids come first: ids of a BPE vocabulary are its merges in order of frequency.
    """
    if num_tokens >= vocab_size:
        return None
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for row in rows:
        counts_V += torch.bincount(row.token_ids_T[row.learned_T], minlength=vocab_size)
    order_V = torch.sort(counts_V, descending=True, stable=True).indices
    return order_V[:num_tokens].sort().values
