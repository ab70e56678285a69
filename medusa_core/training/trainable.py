"""Heads while they are trained: K towers of residual blocks over the base model's own output layer, which stays as it is."""

# Shape suffixes: N positions · E hidden

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional


class TrainableHeads(nn.Module):
    """Float32. A new head is the identity: it starts out guessing what the model is about to say next.

    num_layers: residual blocks x + silu(linear(x)) per head.
    """

    def __init__(self, hidden_size: int, *, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_layers = num_layers
        # head by head, block by block
        self.linears = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_heads * num_layers))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_NE: Tensor, head: int) -> Tensor:
        """What head `head` hands to the output layer, [N, E]."""
        x_NE = hidden_NE
        for linear in self.linears[head * self.num_layers : (head + 1) * self.num_layers]:
            x_NE = x_NE + functional.silu(linear(x_NE))
        return x_NE


def export_heads(
    heads: TrainableHeads, path: Path, *, token_map_V: Tensor | None, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Write heads as `load_heads` reads them: TGI's layout, `{head}.{layer}.linear.weight|bias`, and a token map if the draft
    vocabulary is reduced."""
    tensors = {
        f"{number // heads.num_layers}.{number % heads.num_layers}.linear.{name}": parameter.detach().to(dtype).cpu().contiguous()
        for number, linear in enumerate(heads.linears)
        for name, parameter in linear.named_parameters()
    }
    if token_map_V is not None:
        tensors["token_map"] = token_map_V.cpu()
    # A server may have the file that this one replaces in its memory.
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=dict(metadata))
    partial.replace(path)
