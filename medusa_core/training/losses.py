"""What heads are trained to minimise, from draft logits and what the base model itself would have said.

Shapes: N positions · V draft vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the terms of one head's loss, and how they fall from head to head.

    cross_entropy: against the token of the text. distillation: cross entropy against the base model's distribution of that token.
    total_variation: half the L1 distance of the two distributions, which is the rate at which drafts are rejected (LK losses,
    arXiv:2602.23881). decay: head k (0-based) counts decay ** k (0.8 in the Medusa paper, arXiv:2401.10774).
    """

    cross_entropy: float = 0.5
    distillation: float = 0.5
    total_variation: float = 0.0
    decay: float = 0.8

    def __post_init__(self) -> None:
        terms = (self.cross_entropy, self.distillation, self.total_variation)
        if not (all(math.isfinite(term) and term >= 0.0 for term in terms) and sum(terms) > 0.0):
            raise ConfigError("The weights of the loss must be numbers that are not negative, and one must be positive.")
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"The decay from head to head must lie in (0, 1], got {self.decay}.")

    @property
    def needs_teacher(self) -> bool:
        return self.distillation > 0.0 or self.total_variation > 0.0


def head_loss(logits_NV: Tensor, target_N: Tensor, teacher_logits_NV: Tensor | None, weights: LossWeights) -> Tensor:
    """The mean loss of one head, without its decay; float32 scalar.

    Args:
        logits_NV: float32.
        target_N: int64 draft ids; -100 for tokens outside the draft vocabulary, which no cross entropy is taken of.
        teacher_logits_NV: the base model's logits of the same tokens, over the draft vocabulary; needed by two of the terms.
    """
    log_q_NV = functional.log_softmax(logits_NV, dim=-1)
    loss = logits_NV.new_zeros(())
    if weights.cross_entropy > 0.0:
        # the mean over all positions, also those that the vocabulary excludes: a batch of them counts for little
        total = functional.nll_loss(log_q_NV, target_N, reduction="sum")
        loss = loss + weights.cross_entropy * total / max(len(target_N), 1)
    if weights.needs_teacher:
        assert teacher_logits_NV is not None
        p_NV = torch.softmax(teacher_logits_NV.float(), dim=-1)
        if weights.distillation > 0.0:
            loss = loss - weights.distillation * (p_NV * log_q_NV).sum(dim=-1).mean()
        if weights.total_variation > 0.0:
            distance_N = 0.5 * (p_NV - log_q_NV.exp()).abs().sum(dim=-1)
            loss = loss + weights.total_variation * distance_N.mean()
    return loss
