"""Medusa heads: K small networks that guess the tokens behind the next one from one hidden state.

Head k (0-based) reads the hidden state of position t behind the final norm, from which the base model predicts token t+1, and
predicts token t+2+k. A head is L residual blocks `x + silu(linear(x))` and an output layer. Three output layers exist in the wild:
the base model's `lm_head` shared by all heads, one `lm_head` per head, and either of them over a reduced draft vocabulary.
"""

# Shape suffixes: B requests · K heads · L blocks per head · C candidates per head · V draft vocabulary · E hidden

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.model.projection import Projection
from medusa_core.model.sequential_heads import SequentialHeads


class MedusaHeads(nn.Module):
    """All heads of a model, stacked so that each layer is one batched product.

    Args:
        weight_LKEE, bias_LKE: the residual blocks' linears; bias None for heads without one.
        lm_head_KVE: output layers of their own, one per head.
        draft_projection: an output layer shared by the heads, over the draft vocabulary. With neither, the base model's
            projection is used.
        token_map_V: base id of each draft token, int64; None when draft ids are base ids.
    """

    token_map_V: Tensor | None

    def __init__(
        self,
        weight_LKEE: Tensor,
        bias_LKE: Tensor | None,
        *,
        lm_head_KVE: Tensor | None = None,
        draft_projection: Projection | None = None,
        token_map_V: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight_LKEE = nn.Parameter(weight_LKEE, requires_grad=False)
        self.bias_LKE = None if bias_LKE is None else nn.Parameter(bias_LKE, requires_grad=False)
        self.lm_head_KVE = None if lm_head_KVE is None else nn.Parameter(lm_head_KVE, requires_grad=False)
        self.draft_projection = draft_projection
        self.register_buffer("token_map_V", token_map_V)

    @property
    def num_layers(self) -> int:
        return self.weight_LKEE.shape[0]

    @property
    def num_heads(self) -> int:
        return self.weight_LKEE.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.weight_LKEE.shape[2]

    @property
    def draft_vocab_size(self) -> int | None:
        """Width of the draft logits; None when it is the base projection's."""
        if self.lm_head_KVE is not None:
            return self.lm_head_KVE.shape[1]
        return None if self.draft_projection is None else self.draft_projection.num_tokens

    @property
    def layout(self) -> str:
        """One phrase for logs: how the heads get their logits."""
        if self.lm_head_KVE is not None:
            return "own lm_head"
        return "shared lm_head" if self.draft_projection is None else "shared lm_head, reduced draft vocabulary"

    def transform(self, hidden_BE: Tensor, num_heads: int | None = None) -> Tensor:
        """The residual blocks of the first `num_heads` heads (None: all): [K, B, E], what the output layers read."""
        x_KBE = hidden_BE.expand(num_heads or self.num_heads, *hidden_BE.shape)
        block: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _residual_block
        if hidden_BE.is_cuda and hidden_BE.dtype != torch.float32:
            # imported here, because a CPU build of torch comes without triton
            from medusa_core.kernels.linear import heads_block
            from medusa_core.kernels.support import can_overlap_launches

            block = partial(heads_block, use_pdl=can_overlap_launches(hidden_BE.device))
        for layer, weight_KEE in enumerate(self.weight_LKEE[:, :num_heads]):
            x_KBE = block(x_KBE, weight_KEE, None if self.bias_LKE is None else self.bias_LKE[layer, :num_heads])
        return x_KBE

    def forward(self, hidden_BE: Tensor, project: Callable[[Tensor], Tensor], num_heads: int | None = None) -> Tensor:
        """Draft logits float32 [B, K, V] over the draft vocabulary, of the first `num_heads` heads (None: all).

        project: the base model's projection, used by heads that share its lm_head.
        """
        x_KBE = self.transform(hidden_BE, num_heads)
        if self.lm_head_KVE is not None:
            return torch.bmm(x_KBE, self.lm_head_KVE[:num_heads].transpose(1, 2)).float().transpose(0, 1)
        output = self.draft_projection or project
        logits_RV = output(x_KBE.transpose(0, 1).reshape(-1, self.hidden_size))
        return logits_RV.view(hidden_BE.shape[0], x_KBE.shape[0], -1)

    def topk(self, hidden_BE: Tensor, num_heads: int, num_candidates: int, *, project: Callable[[Tensor], Tensor]) -> Tensor:
        """The first heads' best tokens, best first: base vocabulary ids, int64 [B, K, C]."""
        logits_BKV = self(hidden_BE, project, num_heads)
        if logits_BKV.is_cuda:
            # a CPU build of torch comes without triton
            from medusa_core.kernels.support import can_overlap_launches
            from medusa_core.kernels.topk import topk_rows

            use_pdl = can_overlap_launches(hidden_BE.device)
            ids = topk_rows(logits_BKV.flatten(0, 1), num_candidates, token_map_V=self.token_map_V, use_pdl=use_pdl)
            return ids.view(*logits_BKV.shape[:2], num_candidates)
        return self._base_ids(logits_BKV.topk(num_candidates, dim=-1).indices)

    def candidates_along(
        self,
        hidden_RE: Tensor,
        before_RK: Tensor,
        num_candidates: int,
        *,
        project: Callable[[Tensor], Tensor],
        embed: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """As `SequentialHeads.candidates_along`; independent heads do not look at the tokens in between."""
        return self.topk(hidden_RE, self.num_heads, num_candidates, project=project)

    def _base_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self.token_map_V is None else self.token_map_V[draft_ids]


DraftHeads = MedusaHeads | SequentialHeads


def _residual_block(x_KBE: Tensor, weight_KEE: Tensor, bias_KE: Tensor | None) -> Tensor:
    if bias_KE is None:
        y_KBE = torch.bmm(x_KBE, weight_KEE.transpose(1, 2))
    else:
        y_KBE = torch.baddbmm(bias_KE.unsqueeze(1), x_KBE, weight_KEE.transpose(1, 2))
    return x_KBE + functional.silu(y_KBE)
