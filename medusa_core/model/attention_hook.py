"""How our attention enters a transformers model: one registered function, and a context object passed as a forward argument.

transformers looks the attention function up by name, and builds no mask at all for a name it has no mask function for; so the
paged cache, the tree mask and the sliding window are ours alone, and no modelling file is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from medusa_core.attention.context import AttentionContext
from medusa_core.attention.segments import AttentionParams
from medusa_core.errors import UnsupportedModelError

ATTENTION_NAME = "medusa_paged"


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    medusa_context: AttentionContext | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function transformers calls in each attention layer; its signature is transformers'.

    Args:
        query: [1, H, T, D], rotary embedding applied. key, value: [1, G, T, D].
        attention_mask: always None under this name; masking is the context's.
        medusa_context: forward argument of the model call.

    Returns:
        ([1, T, H, Dv], None).

    Raises:
        UnsupportedModelError: the model did not hand the context through to its attention.
    """
    if medusa_context is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass forward arguments on to its attention function, so it cannot be served."
        )
    layer_idx = module.layer_idx
    if not isinstance(layer_idx, int):
        raise UnsupportedModelError(f"{type(module).__name__} has no layer_idx, so its layers cannot be told apart in the cache.")
    params = AttentionParams(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, window=sliding_window, softcap=softcap, sinks_H=s_aux
    )
    query_THD, key_TGD, value_TGD = (states[0].transpose(0, 1) for states in (query, key, value))
    out_THD = medusa_context.attend(layer_idx, query_THD, key_TGD, value_TGD, params)
    return out_THD.unsqueeze(0), None


def install_attention(model: PreTrainedModel) -> None:
    """Make `model` use the paged attention. Registering the same function under the same name again is harmless."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    model.set_attn_implementation(ATTENTION_NAME)


def forward_hidden(model: PreTrainedModel, token_ids_T: Tensor, position_ids_T: Tensor, context: AttentionContext) -> Tensor:
    """Hidden states after the final norm, [T, E], of one packed step. `model` is the CausalLM; its lm_head is not run."""
    base = getattr(model, model.base_model_prefix)
    output = base(
        input_ids=token_ids_T.unsqueeze(0),
        position_ids=position_ids_T.unsqueeze(0),
        use_cache=False,
        medusa_context=context,
    )
    hidden_TE: Tensor = output.last_hidden_state.squeeze(0)
    return hidden_TE


class ShapeProbe:
    """An AttentionContext that records the shapes each layer asks to cache, and attends to nothing."""

    def __init__(self) -> None:
        # layer index -> (KV heads, key dim, value dim)
        self.layer_shapes: dict[int, tuple[int, int, int]] = {}

    def attend(self, layer_idx: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, params: AttentionParams) -> Tensor:
        self.layer_shapes[layer_idx] = (key_TGD.shape[1], key_TGD.shape[2], value_TGD.shape[2])
        return value_TGD.new_zeros(*query_THD.shape[:2], value_TGD.shape[2])


def probe_layer_shapes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """(KV heads, key dim, value dim) of each layer, read off a one-token forward pass rather than from the config: configs spell
    these numbers in many ways, and under tensor parallelism a rank holds only its own heads."""
    probe = ShapeProbe()
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        forward_hidden(model, zero, zero, probe)
    if sorted(probe.layer_shapes) != list(range(len(probe.layer_shapes))) or not probe.layer_shapes:
        raise UnsupportedModelError(f"attention layers are numbered {sorted(probe.layer_shapes)}, expected 0, 1, 2, ...")
    return [probe.layer_shapes[i] for i in range(len(probe.layer_shapes))]
