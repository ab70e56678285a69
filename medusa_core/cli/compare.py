"""Is the output with speculation the output without it? And where sixteen bits made a difference: was it a near-tie?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medusa_core.bench.figures import first_difference
from medusa_core.config import ModelConfig
from medusa_core.model.loader import load_model
from medusa_core.params import SamplingParams
from medusa_core.sampling.noise import gumbel
from medusa_core.scheduler.noise import noise_key

__all__ = ["Rescore", "first_difference", "rescore"]

# Near-tie: the float32 gap between the two candidates is within this many units of rounding (machine epsilon times the largest
# logit). The products of a tree's rows and of a single row are summed in different orders, layer after layer.
TOLERANCE_UNITS = 4.0


@dataclass(frozen=True, slots=True)
class Rescore:
    """The first difference, scored again in float32 by transformers' own attention.

    index: position in the output. tokens: (with speculation, without). gap: distance of their scores; for sampled output the scores
    include temperature and noise. tolerance: the largest gap that counts as a near-tie.
    """

    index: int
    tokens: tuple[int, int]
    gap: float
    tolerance: float

    @property
    def is_near_tie(self) -> bool:
        return self.gap <= self.tolerance


@torch.inference_mode()
def rescore(
    config: ModelConfig,
    prompt_token_ids: list[int],
    params: SamplingParams,
    with_speculation: list[int],
    without: list[int],
    index: int,
) -> Rescore:
    """Score the two candidates at the first difference in float32, with the same weights."""
    loaded = load_model(config, progress=False)
    rounding = torch.finfo(loaded.dtype).eps
    loaded.model.float()
    ids = torch.tensor([prompt_token_ids + without[:index]], device=loaded.device)
    hidden_TE = loaded.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    logits_1V = loaded.project(hidden_TE[-1:])
    tolerance = TOLERANCE_UNITS * rounding * float(logits_1V.abs().max())
    scores_V = logits_1V[0]
    if not params.is_greedy:
        key = noise_key(params.seed, 0)
        key_1 = torch.tensor([key - 2**64 if key >= 2**63 else key], device=loaded.device)
        tokens_V = torch.arange(scores_V.shape[0], dtype=torch.int32, device=loaded.device)
        index_1 = torch.tensor([index], device=loaded.device)
        scores_V = scores_V / params.temperature + gumbel(key_1, index_1, tokens_V)[0]
        tolerance /= params.temperature
    candidates = (with_speculation[index], without[index])
    gap = abs(float(scores_V[candidates[0]] - scores_V[candidates[1]]))
    return Rescore(index, candidates, gap, tolerance)
