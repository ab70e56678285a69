"""Swapping a loaded model's modules for fused ones, each proved first.

A fuser recognises a decoder layer by its structure: names, shapes and kinds of its parts, never its class. Structure alone does not
say what a forward does with the parts (a norm may add one to its weight, a residual may be scaled), so every fused module is run
beside the original on random input before it takes its place; what differs stays as it is. Import this module only where kernels
run (CUDA, or Triton's interpreter).

Shapes: T rows · E hidden · H/G query/KV heads · D head dim · L positions.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from medusa_core.attention.segments import AttentionParams
from medusa_core.kernels.linear import fold_norm, interleave, split_counters
from medusa_core.kernels.support import KernelError, can_overlap_launches
from medusa_core.kernels.topk import argmax_rows
from medusa_core.model.attention_hook import install_attention
from medusa_core.model.fused_layer import (
    DecoderShape,
    DecoderWeights,
    Float32Linear,
    FusedDecoderLayer,
    FusedRMSNorm,
    FusionSettings,
    IndexedEmbedding,
    TabledRotary,
)
from medusa_core.model.projection import Projection

logger = logging.getLogger(__name__)

# Rows that take each path of the products: few, up to the skinny kernel's limits, more.
_PROOF_ROWS = (3, 17, 65)
# Small beside what layers add to it, or the rounding of the sum would hide the update that is compared.
_PROOF_SCALE = 0.05
# Relative norm of the difference of two updates. In 16 bits each of some ten roundings on the way may fall the other way (half a
# unit in the last place: 2^-9 in bfloat16, 2^-12 in float16); a layer that computes something else is off by a tenth and more.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Draft nodes of a request's last steps lie beyond its longest sequence, one position per level of the tree.
_SPARE_POSITIONS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionReport:
    """What of a model was fused, for the log and for benchmarks."""

    num_layers: int
    num_fused_layers: int
    has_fused_norm: bool
    has_tabled_rotary: bool

    def __str__(self) -> str:
        parts = [f"{self.num_fused_layers} of {self.num_layers} layers"]
        parts += ["the final norm"] * self.has_fused_norm + ["rotary tables"] * self.has_tabled_rotary
        return ", ".join(parts)


class LayerMatch(Protocol):
    """A decoder layer that a fuser knows the structure of."""

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    def build(self, params: AttentionParams, settings: FusionSettings) -> nn.Module:
        """The fused layer, with copies of the weights. params: what the original asks of its attention."""
        ...


@torch.inference_mode()
def fuse_model(model: PreTrainedModel, max_model_len: int, *, use_pdl: bool | None = None) -> FusionReport:
    """Swap whatever can be fused and is proved equal. Mutates `model`: it runs with a fused layer's context from then on.

    Args:
        model: on its device, in eval mode. The paged attention is installed on it.
        max_model_len: longest sequence that will be run, draft nodes beyond it aside.
        use_pdl: overlap launches; see FusionSettings. None: where the device can.
    """
    install_attention(model)
    trunk: Any = getattr(model, model.base_model_prefix)
    settings = FusionSettings(
        counters=split_counters(model.device), use_pdl=can_overlap_launches(model.device) if use_pdl is None else use_pdl
    )
    has_tables = _table_rotary(trunk, model, max_model_len)
    layers = trunk.layers if isinstance(getattr(trunk, "layers", None), nn.ModuleList) else nn.ModuleList()
    num_layers = len(layers)
    num_fused = 0
    for idx in range(num_layers if has_tables else 0):
        # the originals go one by one, so that no more than one layer is held twice
        if fused := _fuse_layer(layers[idx], trunk.rotary_emb, model, settings):
            layers[idx] = fused
            num_fused += 1
    # worthwhile beside fused layers only, and a fused layer shows that the norm's rounding is this family's
    has_norm = num_fused > 0 and _fuse_norm(trunk, model, settings)
    if type(embedding := model.get_input_embeddings()) is nn.Embedding:  # not a subclass, which may scale
        model.set_input_embeddings(IndexedEmbedding(nn.Parameter(embedding.weight, requires_grad=False)))
    report = FusionReport(num_layers=num_layers, num_fused_layers=num_fused, has_fused_norm=has_norm, has_tabled_rotary=has_tables)
    logger.info("Fused %s.", report)
    return report


def fuse_projection(projection: Projection, *, use_pdl: bool | None = None) -> bool:
    """Let a projection of 16-bit weights write float32 from its sums; returns whether it does. Mutates `projection`.

    use_pdl: as for `fuse_model`.
    """
    linear = projection.linear
    if type(linear) is not nn.Linear or linear.weight.dtype == torch.float32 or not linear.weight.is_contiguous():
        return False
    if use_pdl is None:
        use_pdl = can_overlap_launches(linear.weight.device)
    fused = Float32Linear(linear, use_pdl=use_pdl)
    projection.linear = fused
    # A scale or a soft cap behind the product may make ties of what differs.
    if projection.multiplier == 1.0 and projection.softcap is None and _finds_best(fused):
        projection.best_token = fused.best
    return True


def _finds_best(linear: Float32Linear) -> bool:
    """Whether the short way to the largest result finds the same as the results themselves, for random rows."""
    for num_rows in _PROOF_ROWS:
        noise = torch.randn(num_rows, linear.in_features, generator=torch.Generator().manual_seed(num_rows))
        rows_TE = noise.to(linear.weight.device, linear.weight.dtype)
        if not torch.equal(linear.best(rows_TE), argmax_rows(linear(rows_TE))):
            logger.warning("The largest logit is not found inside the output product of %d rows, so logits are written.", num_rows)
            return False
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedLayer:
    """A pre-norm layer with rotary attention and a gated SiLU MLP: Llama, Qwen2, Qwen3, Mistral."""

    layer: Any
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def build(self, params: AttentionParams, settings: FusionSettings) -> FusedDecoderLayer:
        """See LayerMatch."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        weights = DecoderWeights(
            qkv_FE=fold_norm(torch.cat([linear.weight for linear in inputs]), self.layer.input_layernorm.weight),
            qkv_bias_F=None if inputs[0].bias is None else torch.cat([linear.bias for linear in inputs]),
            q_norm_D=None if q_norm is None else q_norm.weight,
            k_norm_D=None if k_norm is None else k_norm.weight,
            o_EF=attention.o_proj.weight,
            o_bias_E=attention.o_proj.bias,
            gate_up_2IE=fold_norm(interleave(mlp.gate_proj.weight, mlp.up_proj.weight), self.layer.post_attention_layernorm.weight),
            down_EI=mlp.down_proj.weight,
            down_bias_E=mlp.down_proj.bias,
        )
        shape = DecoderShape(
            layer_idx=attention.layer_idx,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            params=params,
            input_eps=self.layer.input_layernorm.variance_epsilon,
            mlp_eps=self.layer.post_attention_layernorm.variance_epsilon,
            head_eps=0.0 if q_norm is None else q_norm.variance_epsilon,
        )
        return FusedDecoderLayer(weights, shape, settings)


def match_gated_layer(layer: Any) -> GatedLayer | None:
    """The layer as a GatedLayer, or None if it has other parts, or more."""
    if {name for name, _ in layer.named_children()} != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    linears: dict[str, Any] = {
        f"self_attn.{name}": getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    linears |= {f"mlp.{name}": getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")}
    norms = {name: getattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")}
    norms |= {f"self_attn.{name}": getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)}
    if not all(type(linear) is nn.Linear for linear in linears.values()) or not all(map(_is_rms_norm, norms.values())):
        return None
    known = {f"{name}.{part}" for name, module in (linears | norms).items() for part, _ in module.named_parameters()}
    if known != {name for name, _ in layer.named_parameters()} or any(True for _ in layer.named_buffers()):
        return None
    if type(getattr(mlp, "act_fn", None)) not in {nn.SiLU, type(ACT2FN["silu"])} or mlp.gate_proj.bias is not None:
        return None
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or not isinstance(getattr(attention, "layer_idx", None), int):
        return None
    match = GatedLayer(
        layer=layer,
        num_heads=attention.q_proj.out_features // head_dim,
        num_kv_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
    )
    return match if _has_consistent_shapes(match, norms) else None


def _has_consistent_shapes(match: GatedLayer, norms: dict[str, Any]) -> bool:
    attention, mlp = match.layer.self_attn, match.layer.mlp
    hidden_size, query_size = attention.q_proj.in_features, match.num_heads * match.head_dim
    heads = [norms[name] for name in norms if name.startswith("self_attn.")]
    biases = {linear.bias is None for linear in (attention.q_proj, attention.k_proj, attention.v_proj)}
    return (
        attention.q_proj.out_features == query_size == attention.o_proj.in_features
        and attention.k_proj.out_features == attention.v_proj.out_features == match.num_kv_heads * match.head_dim
        and match.head_dim % 2 == 0
        and len(biases) == 1
        and mlp.up_proj.bias is None
        and mlp.gate_proj.out_features == mlp.up_proj.out_features == mlp.down_proj.in_features
        and attention.o_proj.out_features == mlp.down_proj.out_features == mlp.gate_proj.in_features == hidden_size
        and len(heads) in (0, 2)
        and all(norm.weight.shape == (match.head_dim,) for norm in heads)
        and len({norm.variance_epsilon for norm in heads}) <= 1
    )


def _is_rms_norm(module: Any) -> bool:
    """Whether the parts are those of transformers' RMS norms. What they do with them, the proof says."""
    return (
        isinstance(module, nn.Module)
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


# Tried in order on every decoder layer.
LAYER_FUSERS: Sequence[Callable[[nn.Module], LayerMatch | None]] = (match_gated_layer,)


@dataclass
class _ProofContext:
    """Dense causal attention over the rows of one call, both for a layer as transformers has it and for a fused one.

    params: what the original asked for, recorded.
    """

    slots_T: Tensor
    key_slots_SGD: Tensor
    value_slots_SGD: Tensor
    params: list[AttentionParams] = field(default_factory=list)

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.key_slots_SGD, self.value_slots_SGD

    def attend(self, layer_idx: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, params: AttentionParams) -> Tensor:
        self.params.append(params)
        return _attend_densely(query_THD, key_TGD, value_TGD, params)

    def attend_written(self, layer_idx: int, query_THD: Tensor, params: AttentionParams) -> Tensor:
        return _attend_densely(query_THD, self.key_slots_SGD[self.slots_T], self.value_slots_SGD[self.slots_T], params)


def _attend_densely(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, params: AttentionParams) -> Tensor:
    num_rows, num_heads, _ = query_THD.shape
    num_repeats = num_heads // key_TGD.shape[1]
    key_THD, value_THD = (states.float().repeat_interleave(num_repeats, dim=1) for states in (key_TGD, value_TGD))
    scores_HTT = torch.einsum("thd,shd->hts", query_THD.float(), key_THD) * params.scaling
    row_T = torch.arange(num_rows, device=query_THD.device)
    distance_TT = row_T[:, None] - row_T[None, :]
    is_visible_TT = (distance_TT >= 0) & (distance_TT < (params.window or num_rows))
    weights_HTT = scores_HTT.masked_fill(~is_visible_TT, -torch.inf).softmax(dim=-1)
    return torch.einsum("hts,shd->thd", weights_HTT, value_THD).to(query_THD.dtype)


def _fuse_layer(original: nn.Module, rotary: nn.Module, model: PreTrainedModel, settings: FusionSettings) -> nn.Module | None:
    """The fused layer if a fuser matches and its work is proved equal."""
    match = next((match for fuser in LAYER_FUSERS if (match := fuser(original))), None)
    if match is None:
        return None
    name = f"A {type(original).__name__}"
    try:
        params = _run_layer(original, rotary, match, model, _PROOF_ROWS[0])[1].params
        if len(params) != 1 or params[0].softcap is not None or params[0].sinks_H is not None:
            return None
        fused = match.build(params[0], settings)
        for num_rows in _PROOF_ROWS:
            expected = _run_layer(original, rotary, match, model, num_rows)[0]
            actual = _run_layer(fused, rotary, match, model, num_rows)[0]
            if not _is_equal(actual, expected, f"{name} of {num_rows} rows"):
                return None
    except (KernelError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        # a kernel that does not fit the device, or a forward that wants other arguments
        logger.warning("%s is left as it is: %s.", name, (str(error).splitlines() or [type(error).__name__])[0])
        return None
    return fused


def _run_layer(
    layer: nn.Module, rotary: nn.Module, match: LayerMatch, model: PreTrainedModel, num_rows: int
) -> tuple[Tensor, _ProofContext]:
    """What the layer adds to random rows, [T, E], and the context it ran in. The same rows for the same number."""
    device, dtype = model.device, model.dtype
    size = model.config.get_text_config().hidden_size
    noise = torch.randn(1, num_rows, size, generator=torch.Generator().manual_seed(num_rows))
    hidden = (noise * _PROOF_SCALE).to(device, dtype)
    # written backwards, so that a slot is never its row
    slots_T = torch.arange(num_rows, 0, -1, device=device)
    key_slots_SGD, value_slots_SGD = (
        torch.zeros(num_rows + 1, match.num_kv_heads, match.head_dim, device=device, dtype=dtype) for _ in range(2)
    )
    context = _ProofContext(slots_T, key_slots_SGD, value_slots_SGD)
    # positions that rotary tables hold for the shortest of contexts
    position_ids = (torch.arange(num_rows, device=device) % _SPARE_POSITIONS).unsqueeze(0)
    out = layer(
        hidden,
        attention_mask=None,
        position_ids=position_ids,
        past_key_values=None,
        use_cache=False,
        position_embeddings=rotary(hidden, position_ids),
        medusa_context=context,
    )
    return (out - hidden)[0], context


def _is_equal(actual: Tensor, expected: Tensor, name: str) -> bool:
    """By relative norm; a difference is logged."""
    error = ((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()
    # written so that NaN is a difference
    if error <= _TOLERANCES.get(expected.dtype, 0.0):
        return True
    logger.warning("%s differs from its fused counterpart by %.2g, so the original stays.", name, error)
    return False


def _fuse_norm(trunk: Any, model: PreTrainedModel, settings: FusionSettings) -> bool:
    """Swap the norm behind the last layer."""
    norm: Any = getattr(trunk, "norm", None)
    if not _is_rms_norm(norm):
        return False
    fused = FusedRMSNorm(norm.weight, norm.variance_epsilon, settings)
    noise = torch.randn(1, _PROOF_ROWS[0], norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
    hidden = noise.to(model.device, model.dtype)
    if not _is_equal(fused(hidden), norm(hidden), "The final norm"):
        return False
    trunk.norm = fused
    return True


def _table_rotary(trunk: nn.Module, model: PreTrainedModel, max_model_len: int) -> bool:
    """Swap the rotary module for its tables if the tables give the bits of two other calls, a short and a long one."""
    rotary = getattr(trunk, "rotary_emb", None)
    if not isinstance(rotary, nn.Module) or list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        return False
    num_positions = max_model_len + _SPARE_POSITIONS
    like = torch.empty(1, 1, dtype=model.dtype, device=model.device)
    position_L = torch.arange(num_positions, device=model.device)
    tables = TabledRotary(*(table[0].contiguous() for table in rotary(like, position_L.unsqueeze(0))))
    for position_ids in (position_L[None, :7], position_L[None, -7:].flip(1)):
        if not all(map(torch.equal, tables(like, position_ids), rotary(like, position_ids))):
            logger.warning("%s depends on more than the position, so it stays.", type(rotary).__name__)
            return False
    trunk.rotary_emb = tables
    return True
