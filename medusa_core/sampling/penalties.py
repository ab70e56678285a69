"""What a request adds to the logits of single tokens: penalties for tokens that were there before, and biases.

In this order, on the raw logits, before temperature and filters:

- repetition penalty r (CTRL, arXiv:1909.05858): of tokens in the prompt or the output, a positive logit is divided by r, any other
  multiplied;
- frequency and presence penalty, over the output alone: logit - count * frequency - (count > 0) * presence, as OpenAI defines them;
- the bias.

In a tree, the output of a node includes the drafts on the path to it, so a draw is what it would be without the tree.

Shapes: R rows · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyRows:
    """Of R rows. repetition_R (1 = off), frequency_R, presence_R: float32. count_RV: how often a token is in the output, int32.
    is_prompt_RV: whether it is in the prompt, bool. bias_RV: float32."""

    repetition_R: Tensor
    frequency_R: Tensor
    presence_R: Tensor
    count_RV: Tensor
    is_prompt_RV: Tensor
    bias_RV: Tensor

    def take(self, rows_r: Tensor) -> PenaltyRows:
        """The same for a selection of rows."""
        return PenaltyRows(
            repetition_R=self.repetition_R[rows_r],
            frequency_R=self.frequency_R[rows_r],
            presence_R=self.presence_R[rows_r],
            count_RV=self.count_RV[rows_r],
            is_prompt_RV=self.is_prompt_RV[rows_r],
            bias_RV=self.bias_RV[rows_r],
        )

    def count(self, rows_r: Tensor, token_ids_r: Tensor) -> None:
        """These tokens were drawn, one for each of different rows. Changes count_RV."""
        self.count_RV[rows_r, token_ids_r] += 1


def penalize(logits_RV: Tensor, rows: PenaltyRows) -> Tensor:
    """The logits that are drawn from, float32; a copy."""
    count_RV = rows.count_RV.float()
    is_counted_RV = rows.count_RV > 0
    repetition_R1 = rows.repetition_R.unsqueeze(1)
    repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = torch.where(is_counted_RV | rows.is_prompt_RV, repeated_RV, logits_RV)
    logits_RV = logits_RV - count_RV * rows.frequency_R.unsqueeze(1)
    logits_RV = logits_RV - is_counted_RV.float() * rows.presence_R.unsqueeze(1)
    return logits_RV + rows.bias_RV
