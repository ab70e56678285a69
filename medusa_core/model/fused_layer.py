"""Modules that take the place of a transformers model's own and do the same in fewer launches.

They hold the weights of the modules they replace; `medusa_core.model.fusion` builds them, and proves each before it is swapped in.
Import this module only where kernels run (CUDA, or Triton's interpreter).

Shapes: T packed rows · E hidden · F query, key and value heads side by side · I intermediate · H/G query/KV heads · D head dim · V
vocabulary · S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from medusa_core.attention.segments import AttentionParams
from medusa_core.kernels import linear
from medusa_core.kernels.norm import rms_norm
from medusa_core.kernels.rotary import rotate_and_write


class WrittenContext(Protocol):
    """What a fused layer needs of the object that travels through the forward pass as `medusa_context`."""

    @property
    def slots_T(self) -> Tensor:
        """int64, where the step's keys and values go."""
        ...

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(key_slots_SGD, value_slots_SGD), written in place."""
        ...

    def attend_written(self, layer_idx: int, query_THD: Tensor, params: AttentionParams) -> Tensor:
        """[T, H, D]. The step's keys and values are in their slots already."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionSettings:
    """What fused modules of one model share.

    counters: of split products, see `medusa_core.kernels.linear.split_counters`.
    use_pdl: launch each kernel while the one before still runs, so that weights are read ahead (sm_90 and later).
    """

    counters: Tensor
    use_pdl: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """Weights of one pre-norm decoder layer with a gated SiLU MLP. Biases and the norms over heads are None where it has none.

    qkv_FE, gate_up_2IE: with the weight of the norm ahead of them in them (`linear.fold_norm`); gate and up alternate
    (`linear.interleave`).
    """

    qkv_FE: Tensor
    qkv_bias_F: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    o_EF: Tensor
    o_bias_E: Tensor | None
    gate_up_2IE: Tensor
    down_EI: Tensor
    down_bias_E: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Numbers of one decoder layer. params: what it asks of its attention; head_eps: of the norms over heads."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    params: AttentionParams
    input_eps: float
    mlp_eps: float
    head_eps: float = 0.0


class FusedDecoderLayer(nn.Module):
    """Llama's layer and its relatives: x + attention(norm(x)), then x + mlp(norm(x)), in five launches and the attention's own."""

    qkv_FE: Tensor
    qkv_bias_F: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    o_EF: Tensor
    o_bias_E: Tensor | None
    gate_up_2IE: Tensor
    down_EI: Tensor
    down_bias_E: Tensor | None

    def __init__(self, weights: DecoderWeights, shape: DecoderShape, settings: FusionSettings) -> None:
        super().__init__()
        for name in DecoderWeights.__slots__:
            tensor = getattr(weights, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.shape = shape
        self.settings = settings

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        medusa_context: WrittenContext,
        **_: object,
    ) -> Tensor:
        """What transformers calls a decoder layer with: [1, T, E] and (cos, sin) of [1, T, D] each.

        Returns [1, T, E], a new tensor. Writes the step's keys and values to the context's cache.
        """
        shape, counters, use_pdl = self.shape, self.settings.counters, self.settings.use_pdl
        hidden_TE = hidden_states[0]
        cos_TD, sin_TD = (part[0] for part in position_embeddings)
        qkv_TF = linear.norm_linear(hidden_TE, shape.input_eps, self.qkv_FE, self.qkv_bias_F, counters=counters, use_pdl=use_pdl)
        key_slots_SGD, value_slots_SGD = medusa_context.layer(shape.layer_idx)
        query_THD = rotate_and_write(
            qkv_TF,
            cos_TD,
            sin_TD,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            slots_T=medusa_context.slots_T,
            key_slots_SGD=key_slots_SGD,
            value_slots_SGD=value_slots_SGD,
            q_norm_D=self.q_norm_D,
            k_norm_D=self.k_norm_D,
            eps=shape.head_eps,
            use_pdl=use_pdl,
        )
        attended_TF = medusa_context.attend_written(shape.layer_idx, query_THD, shape.params).flatten(1)
        hidden_TE = linear.linear_residual(attended_TF, self.o_EF, hidden_TE, self.o_bias_E, counters=counters, use_pdl=use_pdl)
        gated_TI = linear.gated_linear(hidden_TE, shape.mlp_eps, self.gate_up_2IE, use_pdl=use_pdl)
        hidden_TE = linear.linear_residual(
            gated_TI, self.down_EI, hidden_TE, self.down_bias_E, counters=counters, may_overwrite=True, use_pdl=use_pdl
        )
        return hidden_TE.unsqueeze(0)


class FusedRMSNorm(nn.Module):
    """A model's RMS norm in one launch."""

    def __init__(self, weight_E: Tensor, eps: float, settings: FusionSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_E, requires_grad=False)
        self.eps = eps
        self.settings = settings

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        rows_TE = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(rows_TE, self.weight, self.eps, use_pdl=self.settings.use_pdl).view(hidden_states.shape)


class IndexedEmbedding(nn.Module):
    """An embedding as an index operation: for few rows torch's kernel for it takes a fraction of the time of `embedding`'s."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, token_ids: Tensor) -> Tensor:
        rows_TE: Tensor = self.weight[token_ids.flatten()]
        return rows_TE.view(*token_ids.shape, -1)


class TabledRotary(nn.Module):
    """Cosines and sines of every position, computed once by the module this one replaces: the same bits, two gathers a step.

    Args:
        cos_LD, sin_LD: one row per position, in the model's dtype. Positions from L on must not be asked for.
    """

    def __init__(self, cos_LD: Tensor, sin_LD: Tensor) -> None:
        super().__init__()
        self.cos_LD = nn.Buffer(cos_LD, persistent=False)
        self.sin_LD = nn.Buffer(sin_LD, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), [..., D] each, of int64 positions [...]. Of `x`, nothing is used: its dtype is the tables'."""
        return self.cos_LD[position_ids], self.sin_LD[position_ids]


class Float32Linear(nn.Linear):
    """An output layer whose results are float32, straight from the sums of the product. Shares its weight with the original."""

    def __init__(self, original: nn.Linear, *, use_pdl: bool = False) -> None:
        super().__init__(original.in_features, original.out_features, bias=False, device="meta", dtype=original.weight.dtype)
        self.weight = original.weight
        self.bias = original.bias
        self.use_pdl = use_pdl

    def forward(self, input: Tensor) -> Tensor:
        """[..., E] -> float32 [..., V]."""
        rows_TE = input.reshape(-1, self.in_features)
        return linear.project(rows_TE, self.weight, self.bias, use_pdl=self.use_pdl).view(*input.shape[:-1], -1)

    def best(self, hidden_TE: Tensor) -> Tensor:
        """Index of each row's largest result, int64 [T], the first among equals; of up to 64 rows without writing the results."""
        return linear.best_output(hidden_TE, self.weight, self.bias, use_pdl=self.use_pdl)
