"""Files of `SequentialHeads`: our own layout, for the shapes that no published one has.

The tensors are the module's parameters by name, and `token_map` if the draft vocabulary is reduced::

    blocks.{h}.{l}.gate_up.weight   blocks.{h}.{l}.bias_SJ   blocks.{h}.{l}.down.weight   or   blocks.{h}.{l}.linear.weight|bias
    own.{h}.weight                  or   low_rank.{h}.weight     markov.weight     correction.weight

What the heads are is told from the names and shapes of the tensors alone; heads that share their blocks have `blocks.0` only, and a
bias each. A matrix may be stored in 8 bits: integers, and a float32
scale for each row in `<name>_scale`.
"""

# Shape suffixes: F rows of a weight · V draft vocabulary

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from medusa_core.errors import ConfigError, HeadsMismatchError
from medusa_core.model.int8_linear import to_int8
from medusa_core.model.loader import LoadedModel
from medusa_core.model.sequential_heads import HeadsShape, Output, SequentialHeads
from medusa_core.model.weights import write_tensor_file

_SCALE = "_scale"
_TELLING = re.compile(r"blocks\.\d+\.\d+\.(gate_up|down|linear)\.weight|markov\.weight|correction\.weight")
_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")
_HINT = "Use heads that were trained for this model (--heads), or --heads none."


def is_sequential_layout(names: Iterable[str]) -> bool:
    """Whether tensors of these names are in our own layout."""
    return any(_TELLING.fullmatch(name) for name in names)


def build_sequential(tensors: Mapping[str, Tensor], token_map_V: Tensor | None, loaded: LoadedModel) -> SequentialHeads:
    """The heads whose parameters `tensors` are, in the base model's dtype and on its device.

    token_map_V: base ids of the draft vocabulary; without one, the heads' own tables say how many tokens it has, or the base model.

    Raises HeadsMismatchError for tensors that do not fit each other or the base model.
    """
    tensors = {name: tensor.to(device=loaded.device, dtype=loaded.dtype) for name, tensor in _widened(tensors).items()}
    for name, tensor in tensors.items():
        if tensor.dim() != (1 if name.endswith(".bias") else 2):
            raise HeadsMismatchError(f"Heads tensor {name} has shape {list(tensor.shape)}, it must be a matrix.", hint=_HINT)
    tables = [tensor.shape[0] for name, tensor in tensors.items() if re.match(r"own\.|markov\.|correction\.", name)]
    vocab_size = len(token_map_V) if token_map_V is not None else tables[0] if tables else loaded.vocab_size
    if vocab_size > loaded.vocab_size:
        raise HeadsMismatchError(
            f"The heads know {vocab_size} tokens, the base model {loaded.name} has {loaded.vocab_size}.", hint=_HINT
        )
    try:
        shape = _shape_of(tensors, loaded.hidden_size)
    except ConfigError as error:
        raise HeadsMismatchError(f"The heads' tensors do not belong together: {error}", hint=_HINT) from error
    with torch.device("meta"):
        heads = SequentialHeads(
            shape,
            hidden_size=loaded.hidden_size,
            vocab_size=vocab_size,
            base_vocab_size=loaded.vocab_size,
        )
    for name, parameter in heads.state_dict().items():
        if name not in tensors:
            raise HeadsMismatchError(f"The heads are incomplete: no tensor {name}.", hint=_HINT)
        if tensors[name].shape != parameter.shape:
            raise HeadsMismatchError(
                f"Heads tensor {name} has shape {list(tensors[name].shape)}, the base model {loaded.name} needs "
                f"{list(parameter.shape)}.",
                hint=_HINT,
            )
    if unknown := sorted(tensors.keys() - heads.state_dict().keys()):
        raise HeadsMismatchError(f"These are no tensors of such heads: {', '.join(unknown[:5])}.", hint=_HINT)
    heads.load_state_dict(tensors, assign=True)
    heads.set_vocabulary(token_map_V, loaded.vocab_size)
    return heads


def save_sequential(
    heads: SequentialHeads, path: Path, *, dtype: torch.dtype, metadata: Mapping[str, str], token_map_V: Tensor | None
) -> None:
    """Write heads as `build_sequential` reads them. dtype: of the matrices; torch.int8 for 8 bits and a scale per row."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in heads.state_dict().items():
        if dtype == torch.int8 and name.endswith(".weight"):
            tensors[name], tensors[name + _SCALE] = to_int8(parameter.cpu())
        else:
            tensors[name] = parameter.to(torch.bfloat16 if dtype == torch.int8 else dtype).cpu().contiguous()
    if token_map_V is not None:
        tensors["token_map"] = token_map_V.to(torch.int32).cpu()
    write_tensor_file(tensors, path, metadata)


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """8-bit matrices as float32."""
    wide = {}
    for name, tensor in tensors.items():
        matrix = tensors.get(name.removesuffix(_SCALE))
        if name.endswith(_SCALE) and matrix is not None and matrix.dtype == torch.int8:
            continue
        if tensor.is_floating_point():
            wide[name] = tensor
            continue
        if tensor.dtype != torch.int8:
            raise HeadsMismatchError(f"Heads tensor {name} is {tensor.dtype}; weights are floating point or int8.", hint=_HINT)
        scale_F = tensors.get(name + _SCALE)
        if tensor.dim() != 2 or scale_F is None or scale_F.shape != tensor.shape[:1]:
            raise HeadsMismatchError(f"Heads tensor {name} is int8, but {name}{_SCALE} does not have a scale per row.", hint=_HINT)
        wide[name] = tensor.float() * scale_F.float()[:, None]
    return wide


def _shape_of(tensors: Mapping[str, Tensor], hidden_size: int) -> HeadsShape:
    positions = [(int(match[1]), int(match[2])) for name in tensors if (match := _BLOCK.match(name))]
    if not positions:
        raise HeadsMismatchError("The heads have no blocks (no tensor like blocks.0.0.down.weight).", hint=_HINT)
    num_heads, num_layers = 1 + max(head for head, _ in positions), 1 + max(layer for _, layer in positions)
    if max(num_heads, num_layers) > len(tensors):
        raise HeadsMismatchError(
            f"The heads are incomplete: {num_heads} x {num_layers} blocks, {len(tensors)} tensors.", hint=_HINT
        )
    gate_up = tensors.get("blocks.0.0.gate_up.weight")
    correction = tensors.get("correction.weight")
    bias = tensors.get("blocks.0.0.bias_SJ")
    num_biases = 1 if bias is None else bias.shape[0]
    has_own, has_low_rank = (any(name.startswith(kind) for name in tensors) for kind in ("own.", "low_rank."))
    output: Output = "own" if has_own else "low-rank" if has_low_rank else "shared"
    return HeadsShape(
        num_heads=max(num_biases, num_heads),
        num_layers=num_layers,
        mlp_size=0 if gate_up is None else max(gate_up.shape[0] // 2, 1),
        is_sequential=num_biases > 1 or (gate_up is not None and gate_up.shape[-1] == 2 * hidden_size),
        shares_blocks=num_biases > 1,
        output=output,
        has_markov_term="markov.weight" in tensors,
        rank=1 if correction is None else correction.shape[-1],
    )
