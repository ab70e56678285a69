"""Trained heads as files that `load_heads` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from medusa_core.model.sequential_heads import SequentialHeads
from medusa_core.model.sequential_layout import save_sequential
from medusa_core.model.weights import write_tensor_file


def export_heads(
    heads: SequentialHeads, path: Path, *, token_map_V: Tensor | None, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Write heads, and a token map if the draft vocabulary is reduced.

    Heads of the Medusa paper's shape are written in TGI's layout, which other engines read as well, all others in our own. dtype:
    of the weights; torch.int8 for 8 bits and a scale per row, which only our own layout has.
    """
    if not heads.shape.is_published or dtype == torch.int8:
        save_sequential(heads, path, dtype=dtype, metadata=metadata, token_map_V=token_map_V)
        return
    tensors = {
        name.removeprefix("blocks."): tensor for name, tensor in heads.state_dict().items() if name.startswith("blocks.")
    } | {
        f"{name.split('.')[1]}.{heads.num_layers}.weight": tensor
        for name, tensor in heads.state_dict().items()
        if name.startswith("own.")
    }
    tensors = {name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in tensors.items()}
    if token_map_V is not None:
        tensors["token_map"] = token_map_V.cpu()
    write_tensor_file(tensors, path, metadata)
