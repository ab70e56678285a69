"""The output projection: hidden states to logits, as a part of its own.

The engine runs a model's trunk and projects only the rows it needs, so what a `ForCausalLM.forward` does behind `lm_head` has to be
done here. `check_projection` compares both at load; an architecture that does something else is refused.
"""

# Shape suffixes: T rows (any leading shape) · V vocabulary · E hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_core.errors import UnsupportedModelError

_NUM_CHECK_TOKENS = 8


class Projection(nn.Module):
    """`lm_head`, then the architecture's logit scale or soft cap in float32.

    The product runs in the model's dtype and is upcast afterwards, so ties between bfloat16 logits stay ties. num_tokens: V, the
    number of logits per row. best_token: hidden_TE -> the token of the largest logit, int64 [T], the lowest id among equals, where
    a fused layer (model/fusion.py) has a shorter way to it than the logits; else None.
    """

    def __init__(self, linear: Any, *, multiplier: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.linear = linear
        # read now: the layer may give way to a packed one, which has no weight to ask
        self.num_tokens: int = linear.weight.shape[0]
        self.multiplier = multiplier
        self.softcap = softcap
        self.best_token: Callable[[Tensor], Tensor] | None = None

    def forward(self, hidden_TE: Tensor) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., E] taken behind the final norm."""
        logits_TV: Tensor = self.linear(hidden_TE).float()
        if self.multiplier != 1.0:
            logits_TV = logits_TV * self.multiplier
        if self.softcap is not None:
            logits_TV = torch.tanh(logits_TV / self.softcap) * self.softcap
        return logits_TV

    def restricted_to(self, token_ids: Tensor) -> Projection:
        """A copy that computes the logits of `token_ids` [V'] only, in that order."""
        if not isinstance(self.linear, nn.Linear):
            raise UnsupportedModelError(
                f"A reduced draft vocabulary needs a plain lm_head, this model's is a {type(self.linear).__name__}.",
                hint="Use heads without a token map.",
            )
        bias = self.linear.bias
        weight = self.linear.weight
        rows = nn.Linear(weight.shape[1], len(token_ids), bias=bias is not None, device="meta")
        rows.weight = nn.Parameter(weight.detach()[token_ids.to(weight.device)], requires_grad=False)
        if bias is not None:
            rows.bias = nn.Parameter(bias.detach()[token_ids.to(bias.device)], requires_grad=False)
        return Projection(rows, multiplier=self.multiplier, softcap=self.softcap)


def build_projection(model: PreTrainedModel) -> Projection:
    """The projection of `model`, from its output embeddings and its config's scale and soft cap.

    Raises UnsupportedModelError for a model without output embeddings.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output embeddings (lm_head), so it cannot generate text.")
    text_config = model.config.get_text_config()
    multiplier = 1.0
    if (scale := getattr(text_config, "logit_scale", None)) is not None:  # Cohere
        multiplier *= float(scale)
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:  # Granite
        multiplier /= float(divisor)
    if (factor := getattr(text_config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        multiplier *= float(factor)
    softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
    return Projection(linear, multiplier=multiplier, softcap=None if softcap is None else float(softcap))


@torch.inference_mode()
def check_projection(model: PreTrainedModel, projection: Projection) -> None:
    """Compare with the model's own logits on a few tokens; raises UnsupportedModelError where they differ."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, _NUM_CHECK_TOKENS), generator=generator).to(model.device)
    trunk = getattr(model, model.base_model_prefix)
    logits = projection(trunk(input_ids=ids, use_cache=False).last_hidden_state)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    # Soft caps and scales run in float32 here and in the model's dtype there.
    tolerance = (1e-4 if model.dtype == torch.float32 else 2e-2) * expected.abs().max().clamp(min=1e-3)
    gap = (logits - expected).abs().max()
    if not bool(gap <= tolerance):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits behind lm_head in a way this server does not know "
            f"(difference {gap.item():.3g}, tolerance {tolerance.item():.3g})."
        )
