"""The draft vocabulary: the tokens that heads may guess, the most frequent ones of the texts they learn from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from medusa_core.training.packing import NO_TARGET, Row


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


def draft_ids(token_map_V: Tensor | None, vocab_size: int) -> Tensor:
    """The draft id of each base id, int64 [vocab_size]; NO_TARGET for tokens that are not drafted."""
    ids = torch.full((vocab_size,), NO_TARGET, dtype=torch.int64)
    base_ids = torch.arange(vocab_size) if token_map_V is None else token_map_V.cpu()
    ids[base_ids] = torch.arange(len(base_ids))
    return ids
