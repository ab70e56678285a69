"""Samples packed into rows of one length, and what each head has to guess there.

A row holds several documents one behind the other, each with positions from 0 on; what is left at its end is padding. Nothing is
ever guessed across the border of two documents.
"""

# Shape suffixes: T tokens of a row · K heads

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.errors import UnsupportedModelError
from medusa_core.model.loader import LoadedModel
from medusa_core.training.samples import Sample

NO_TARGET = -100  # what torch's cross entropy ignores
_PADDING = -1
_CHECKED_LEN = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """token_ids_T, position_ids_T: int64, the model's input. document_T: int64, number of the document, -1 for padding. learned_T:
    bool, whether heads learn to guess the token."""

    token_ids_T: Tensor
    position_ids_T: Tensor
    document_T: Tensor
    learned_T: Tensor

    def targets(self, num_heads: int) -> Tensor:
        """int64 [T, K]: the token that head k (0-based) guesses from position t, number t + 2 + k of the row. NO_TARGET where that
        is past the document's end or not to be learned."""
        num_tokens = len(self.token_ids_T)
        target_TK = torch.full((num_tokens, num_heads), NO_TARGET, dtype=torch.int64)
        for head in range(num_heads):
            num_positions = num_tokens - 2 - head
            if num_positions <= 0:
                break
            ahead = slice(2 + head, None)
            is_target = (self.document_T[ahead] == self.document_T[:num_positions]) & self.learned_T[ahead]
            target_TK[:num_positions, head] = torch.where(is_target, self.token_ids_T[ahead], NO_TARGET)
        return target_TK


def pack_samples(samples: Iterable[Sample], row_len: int) -> tuple[list[Row], int]:
    """Rows in the order of the samples, and how many tokens of samples longer than a row were cut off. A sample of which nothing is
    left to be learned is left out."""
    rows: list[Row] = []
    open_samples: list[Sample] = []
    num_open = num_cut = 0
    for sample in samples:
        if len(sample.token_ids) > row_len:
            num_cut += len(sample.token_ids) - row_len
            sample = Sample(token_ids=sample.token_ids[:row_len], learned=sample.learned[:row_len])
        if not any(sample.learned):
            continue
        if num_open + len(sample.token_ids) > row_len:
            rows.append(_row(open_samples, row_len))
            open_samples, num_open = [], 0
        open_samples.append(sample)
        num_open += len(sample.token_ids)
    if open_samples:
        rows.append(_row(open_samples, row_len))
    return rows, num_cut


@torch.inference_mode()
def check_packing(loaded: LoadedModel) -> None:
    """Compare documents one behind the other, two rows of them, with the same documents alone.

    Raises UnsupportedModelError for a model that tells packed documents apart by something else than positions that start anew."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(loaded.vocab_size, (2 * _CHECKED_LEN,), generator=generator).to(loaded.device)
    positions_T = torch.arange(_CHECKED_LEN, device=loaded.device)

    def read(*rows: Tensor) -> Tensor:
        ids_BT = torch.stack(rows)
        positions_BT = positions_T.repeat(len(rows), ids_BT.shape[1] // _CHECKED_LEN)
        hidden_BTE: Tensor = loaded.base_model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
        return hidden_BTE

    first_T, second_T = ids_T.chunk(2)
    apart_BTE = torch.cat([read(first_T), read(second_T)], dim=1)
    packed_BTE = read(ids_T, torch.cat((second_T, first_T)))
    swapped_BTE = packed_BTE[1:].roll(_CHECKED_LEN, dims=1)
    gap = torch.maximum((packed_BTE[:1] - apart_BTE).abs().max(), (swapped_BTE - apart_BTE).abs().max())
    tolerance = (1e-3 if loaded.dtype == torch.float32 else 5e-2) * apart_BTE.abs().max()
    if not bool(gap <= tolerance):
        raise UnsupportedModelError(
            f"{type(loaded.model).__name__} attends from one packed document to another (difference {gap.item():.3g}, tolerance "
            f"{tolerance.item():.3g}), so heads cannot be trained on it."
        )


def _row(samples: list[Sample], row_len: int) -> Row:
    lengths = [len(sample.token_ids) for sample in samples]
    num_padding = row_len - sum(lengths)
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    # Padding is a document of its own, so that it is attended to by nobody else.
    positions = [position for length in (*lengths, num_padding) for position in range(length)]
    return Row(
        token_ids_T=torch.tensor([token_id for sample in samples for token_id in sample.token_ids] + [0] * num_padding),
        position_ids_T=torch.tensor(positions),
        document_T=torch.tensor(documents + [_PADDING] * num_padding),
        learned_T=torch.tensor([flag for sample in samples for flag in sample.learned] + [False] * num_padding),
    )
