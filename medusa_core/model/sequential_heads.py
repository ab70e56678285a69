"""Heads that are computed one after the other, since each may read what came before: the tokens between, the head in front.

Medusa's heads are independent: from one hidden state each guesses a token without knowing which tokens the others guess. There are
two repairs, and both are here. *Sequential* heads (Hydra, arXiv:2402.05109) carry a state from head to head, which takes in the
embedding of each token on the way. A *Markov term* (DSpark, arXiv:2607.05147) corrects the logits by the token in front, with a
table of low rank. In a tree, the candidates below a node then depend on the path to it.

The same module is trained and served: float32 weights while training, the base model's dtype in an engine.
"""

# Shape suffixes: R rows · K heads · C candidates · E hidden · I width of a block · V draft vocabulary · U base vocabulary ·
# Q rank · S biases · B lanes · m, n nodes with children on one level and the next

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.errors import ConfigError
from medusa_core.model.int8_linear import as_int8
from medusa_core.model.projection import Projection

Output = Literal["shared", "own", "low-rank"]
Project = Callable[[Tensor], Tensor]
Embed = Any  # the base model's embedding: a module that is called with ids and has a `weight` [U, E]

RMS_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsShape:
    """What heads are made of.

    num_heads, num_layers: heads, and blocks of each.
    mlp_size: width of gated blocks; None for the hidden size, or four times that if all heads share them. 0 stands for the residual
        blocks of the Medusa paper.
    is_sequential: each head goes on from the state of the one in front of it; needs gated blocks.
    shares_blocks: sequential heads have the same blocks, but for a bias.
    output: the base model's output layer for all ("shared"), the same with a correction of low rank per head, or a layer of each
        head's own.
    has_markov_term: the correction depends on the token in front of the guessed one as well.
    rank: of the correction.
    """

    num_heads: int = 5
    num_layers: int = 1
    mlp_size: int | None = None
    is_sequential: bool = True
    shares_blocks: bool = True
    output: Output = "shared"
    has_markov_term: bool = False
    rank: int = 64

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers", "rank"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if self.mlp_size is not None and self.mlp_size < 0:
            raise ConfigError(f"mlp_size must not be negative, got {self.mlp_size}.")
        if self.is_sequential and not self.is_gated:
            raise ConfigError(
                "Sequential heads are made of gated blocks, not of residual ones (mlp_size 0).",
                hint="Make them independent, or give the blocks a width.",
            )
        if self.shares_blocks and not self.is_sequential:
            raise ConfigError("Independent heads that share their blocks would all guess the same.")
        if self.output == "own" and self.has_markov_term:
            raise ConfigError("A Markov term corrects an output layer that heads share.", hint='Use output "shared" or "low-rank".')

    @property
    def is_gated(self) -> bool:
        return self.mlp_size != 0

    def width_for(self, hidden_size: int) -> int:
        """Of gated blocks."""
        return self.mlp_size or (4 * hidden_size if self.shares_blocks else hidden_size)

    @property
    def has_correction(self) -> bool:
        return self.output == "low-rank" or self.has_markov_term

    @property
    def is_published(self) -> bool:
        """Whether these are the heads of the Medusa paper, which other engines read too."""
        return not self.is_gated and not self.has_correction


class ResidualBlock(nn.Module):
    """x + silu(linear(x))."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def reset(self) -> None:
        """Make the block the identity."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_RE: Tensor) -> Tensor:
        y_RE: Tensor = self.linear(x_RE)
        return x_RE + functional.silu(y_RE)


class GatedBlock(nn.Module):
    """x + down(silu(gate) * up), gate and up being products of `input`, of which x is a part, with one of S biases.

    Rows of the weight alternate: gate i is row 2i, up i row 2i + 1."""

    def __init__(self, hidden_size: int, num_inputs: int, mlp_size: int, num_biases: int) -> None:
        super().__init__()
        self.gate_up: nn.Module = nn.Linear(num_inputs, 2 * mlp_size, bias=False)
        self.bias_SJ = nn.Parameter(torch.zeros(num_biases, 2 * mlp_size))
        self.down: nn.Module = nn.Linear(mlp_size, hidden_size, bias=False)

    def reset(self) -> None:
        """Make the block the identity."""
        nn.init.zeros_(self.get_parameter("down.weight"))

    def forward(self, x_RE: Tensor, input_RJ: Tensor, bias_idx: int = 0) -> Tensor:
        if _has_kernels(x_RE) and isinstance(self.gate_up, nn.Linear) and isinstance(self.down, nn.Linear):
            from medusa_core.kernels.linear import gated_product, linear_residual
            from medusa_core.kernels.support import can_overlap_launches

            use_pdl = can_overlap_launches(x_RE.device)
            act_RI = gated_product(input_RJ, self.gate_up.weight, self.bias_SJ[bias_idx], use_pdl=use_pdl)
            return linear_residual(act_RI, self.down.weight, x_RE, use_pdl=use_pdl)
        gate_up_RJ = self.gate_up(input_RJ) + self.bias_SJ[bias_idx]
        gate_RI, up_RI = gate_up_RJ.unflatten(-1, (-1, 2)).unbind(-1)
        y_RE: Tensor = self.down(functional.silu(gate_RI) * up_RI)
        # layers in 8 bits give float32
        return x_RE + y_RE.to(x_RE.dtype)


class SequentialHeads(nn.Module):
    """See the module. New heads guess what the base model is about to say next.

    vocab_size: V. base_vocab_size: U. token_map_V: base id of each draft token, int64; None when draft ids are base ids.
    draft_projection: the base model's output layer over the draft vocabulary, if that is reduced and the heads serve in an engine.
    """

    draft_projection: Projection | None
    token_map_V: Tensor | None
    draft_id_U: Tensor | None

    def __init__(
        self,
        shape: HeadsShape,
        *,
        hidden_size: int,
        vocab_size: int,
        base_vocab_size: int,
        token_map_V: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.draft_projection = None
        self.blocks = nn.ModuleList(
            nn.ModuleList(_block(shape, hidden_size, layer) for layer in range(shape.num_layers))
            for _ in range(1 if shape.shares_blocks else shape.num_heads)
        )
        heads = range(shape.num_heads)
        self.own = nn.ModuleList(nn.Linear(hidden_size, vocab_size, bias=False) for _ in heads) if shape.output == "own" else None
        self.low_rank: nn.ModuleList | None = None
        if shape.output == "low-rank":
            self.low_rank = nn.ModuleList(nn.Linear(hidden_size, shape.rank, bias=False) for _ in heads)
        self.markov = nn.Embedding(vocab_size, shape.rank) if shape.has_markov_term else None
        self.correction = nn.Linear(shape.rank, vocab_size, bias=False) if shape.has_correction else None
        self.register_buffer("token_map_V", None, persistent=False)
        self.register_buffer("draft_id_U", None, persistent=False)
        self.set_vocabulary(token_map_V, base_vocab_size)

    def set_vocabulary(self, token_map_V: Tensor | None, base_vocab_size: int) -> None:
        """Which tokens the draft ids stand for; see the class."""
        self.token_map_V = token_map_V
        if self.markov is not None and token_map_V is not None:
            # which row of the Markov table is a token's; -1 for tokens without one
            self.draft_id_U = draft_ids(token_map_V, base_vocab_size, outside=-1)

    def reset(self, lm_head_VE: Tensor) -> None:
        """Make the heads new, in place.

        lm_head_VE: the base model's output layer over the draft vocabulary. A bias or soft cap behind it is not part of output
        layers of the heads' own."""
        for blocks in self.blocks:
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                assert isinstance(block, GatedBlock | ResidualBlock)
                block.reset()
        if self.own is not None:
            for parameter in self.own.parameters():
                parameter.data.copy_(lm_head_VE)
        if self.correction is not None:
            nn.init.zeros_(self.correction.weight)

    @property
    def num_heads(self) -> int:
        return self.shape.num_heads

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def draft_vocab_size(self) -> int | None:
        """Width of the draft logits; None when it is the base projection's."""
        if self.own is not None:
            return self.vocab_size
        return None if self.draft_projection is None else self.draft_projection.num_tokens

    @property
    def layout(self) -> str:
        """One phrase for logs."""
        shape = self.shape
        parts = ["sequential" if shape.is_sequential else "independent"]
        blocks = f"gated blocks of {shape.width_for(self.hidden_size)}" if shape.is_gated else "residual blocks"
        parts.append(f"shared {blocks}" if shape.shares_blocks else blocks)
        parts.append({"own": "own lm_head", "shared": "shared lm_head", "low-rank": "corrected lm_head"}[shape.output])
        if shape.has_markov_term:
            parts.append(f"Markov term of rank {shape.rank}")
        return ", ".join(parts)

    def use_int8(self) -> None:
        """Round the blocks and the draft vocabulary's output layer to 8 bits, in place. On a CPU; they cannot be trained then."""
        for block in self.blocks.modules():
            if isinstance(block, GatedBlock):
                block.gate_up, block.down = as_int8(block.gate_up), as_int8(block.down)
        if self.draft_projection is not None:
            self.draft_projection.linear = as_int8(self.draft_projection.linear)

    def unroll(self, hidden_RE: Tensor, before_RK: Tensor, embed: Embed) -> Iterator[Tensor]:
        """What each head hands to the output layer along a known text, [R, E], head by head.

        before_RK: the token in front of the one that head k guesses (base ids, int64). embed: the base model's embedding.
        """
        x_RE = hidden_RE
        for head in range(self.num_heads):
            if self.shape.is_sequential:
                x_RE = self._advance(head, x_RE, joined_inputs(x_RE, embed(before_RK[:, head])))
            else:
                x_RE = self._advance(head, hidden_RE, hidden_RE)
            yield x_RE

    def logits(self, head: int, x_RE: Tensor, before_R: Tensor, project: Project) -> Tensor:
        """Draft logits, float32 [R, V], of what a head hands to the output layer.

        before_R: the token in front of the guessed one, base ids. project: the base model's output layer over the draft vocabulary.
        """
        if self.own is not None:
            own_RV: Tensor = self.own[head](x_RE)
            return own_RV.float()
        logits_RV = project(x_RE)
        if self.correction is None:
            return logits_RV
        z_RQ = None if self.low_rank is None else self.low_rank[head](x_RE)
        if self.markov is not None:
            term_RQ = self._markov_rows(before_R)
            z_RQ = term_RQ if z_RQ is None else z_RQ + term_RQ
        correction_RV: Tensor = self.correction(z_RQ)
        return logits_RV + correction_RV.float()

    def candidates_along(
        self, hidden_RE: Tensor, before_RK: Tensor, num_candidates: int, *, project: Project, embed: Embed
    ) -> Tensor:
        """Each head's best tokens, best first, if the text goes on as in `before_RK`: base ids, int64 [R, K, C].

        before_RK: the token in front of the one that head k guesses; the root for the first.
        """
        lists = [
            self._topk(head, x_RE, before_RK[:, head], num_candidates, project)
            for head, x_RE in enumerate(self.unroll(hidden_RE, before_RK, embed))
        ]
        return torch.stack(lists, dim=1)

    def step(
        self,
        head: int,
        state_mBE: Tensor,
        lists_mBC: Tensor,
        parent_n: Tensor,
        rank_n: Tensor,
        num_candidates: int,
        *,
        project: Project,
        embed: Embed,
    ) -> tuple[Tensor, Tensor]:
        """One level of a tree: the states of its nodes [n, B, E], and the best tokens below each, int64 [n, B, C].

        Args:
            state_mBE, lists_mBC: of the level above. For the root: the hidden state, and a list of the root's token alone.
            parent_n, rank_n: node j's token is number rank_n[j] in the list of node parent_n[j] of the level above; int64.
        """
        num_lanes, num_nodes = state_mBE.shape[1], parent_n.shape[0]
        if _has_kernels(state_mBE) and self.shape.is_sequential:
            from medusa_core.kernels.head_inputs import join_inputs
            from medusa_core.kernels.support import can_overlap_launches

            x_RE, input_RJ, token_R = join_inputs(
                state_mBE, lists_mBC, parent_n, rank_n, embed.weight, eps=RMS_EPS, use_pdl=can_overlap_launches(state_mBE.device)
            )
        else:
            x_RE = state_mBE[parent_n].flatten(0, 1)
            token_R = lists_mBC[parent_n, :, rank_n].flatten()
            input_RJ = joined_inputs(x_RE, embed(token_R)) if self.shape.is_sequential else x_RE
        y_RE = self._advance(head, x_RE, input_RJ)
        lists_RC = self._topk(head, y_RE, token_R, num_candidates, project)
        # heads that are not sequential all read the same hidden state
        state_RE = y_RE if self.shape.is_sequential else x_RE
        return state_RE.view(num_nodes, num_lanes, -1), lists_RC.view(num_nodes, num_lanes, -1)

    def _advance(self, head: int, x_RE: Tensor, input_RJ: Tensor) -> Tensor:
        shares = self.shape.shares_blocks
        blocks = self.blocks[0 if shares else head]
        assert isinstance(blocks, nn.ModuleList)
        for layer, block in enumerate(blocks):
            if isinstance(block, GatedBlock):
                if layer > 0 or not self.shape.is_sequential:
                    input_RJ = unit_rms(x_RE)
                x_RE = block(x_RE, input_RJ, head if shares else 0)
            else:
                x_RE = block(x_RE)
        return x_RE

    def _topk(self, head: int, x_RE: Tensor, before_R: Tensor, num_candidates: int, project: Project) -> Tensor:
        logits_RV = self.logits(head, x_RE, before_R, self.draft_projection or project)
        if _has_kernels(x_RE):
            from medusa_core.kernels.support import can_overlap_launches
            from medusa_core.kernels.topk import topk_rows

            return topk_rows(
                logits_RV, num_candidates, token_map_V=self.token_map_V, use_pdl=can_overlap_launches(logits_RV.device)
            )
        draft_ids_RC = logits_RV.topk(num_candidates, dim=-1).indices
        return draft_ids_RC if self.token_map_V is None else self.token_map_V[draft_ids_RC]

    def _markov_rows(self, token_R: Tensor) -> Tensor:
        """[R, Q]; zeros for tokens outside the draft vocabulary."""
        assert self.markov is not None
        row_R = token_R if self.draft_id_U is None else self.draft_id_U[token_R]
        is_inside_R = (row_R >= 0) & (row_R < self.vocab_size)
        rows_RQ: Tensor = self.markov(torch.where(is_inside_R, row_R, 0))
        return torch.where(is_inside_R[:, None], rows_RQ, 0.0)


def draft_ids(token_map_V: Tensor | None, base_vocab_size: int, *, outside: int) -> Tensor:
    """The draft id of each base id, int64 [U], on the map's device; `outside` for tokens that are not drafted."""
    if token_map_V is None:
        return torch.arange(base_vocab_size)
    ids_U = torch.full((base_vocab_size,), outside, device=token_map_V.device)
    ids_U[token_map_V] = torch.arange(len(token_map_V), device=token_map_V.device)
    return ids_U


def unit_rms(x_RE: Tensor) -> Tensor:
    """x divided by its root mean square, in x's dtype; statistics in float32."""
    wide_RE = x_RE.float()
    return (wide_RE * torch.rsqrt(wide_RE.square().mean(dim=-1, keepdim=True) + RMS_EPS)).to(x_RE.dtype)


def joined_inputs(state_RE: Tensor, embedding_RE: Tensor) -> Tensor:
    """What the first block of a sequential head reads, [R, 2E]."""
    return torch.cat((unit_rms(state_RE), unit_rms(embedding_RE)), dim=-1)


def _block(shape: HeadsShape, hidden_size: int, layer: int) -> nn.Module:
    if not shape.is_gated:
        return ResidualBlock(hidden_size)
    num_inputs = 2 * hidden_size if shape.is_sequential and layer == 0 else hidden_size
    return GatedBlock(hidden_size, num_inputs, shape.width_for(hidden_size), shape.num_heads if shape.shares_blocks else 1)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32 and not torch.is_grad_enabled()
