"""The floor of a decode step: what it must read from memory, and how fast this device copies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from medusa_core.model.attention_hook import install_attention, probe_layer_shapes
from medusa_core.runtime.kv_store import slot_bytes
from medusa_core.runtime.memory import free_memory_bytes

_NUM_COPIES = 20
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes that one decode step has to read, whatever its number of rows: weights once, and the context of every lane.

    trunk: parameters of the model without its embedding table (of which a step reads one row per token) and without lm_head. All
    experts count, where there are any. lm_head: the projection's weight, all of its rows, also where it is tied to the embeddings.
    per_slot: keys and values of one token, all layers.

    Left out: activations, and what drafting reads, which is a cost of speculation and not a part of the floor. So a tree step and a
    plain step have the same floor, and the share says what a tree really costs.
    """

    trunk: int
    lm_head: int
    per_slot: int

    def total(self, num_lanes: int, context_len: int) -> int:
        return self.trunk + self.lm_head + num_lanes * context_len * self.per_slot


def step_bytes(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> StepBytes:
    """Counted on a model without memory behind it, built from the config in `folder`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return count_step_bytes(model, dtype)


def count_step_bytes(model: PreTrainedModel, dtype: torch.dtype) -> StepBytes:
    """As stored by the engine: `dtype` for every parameter. Changes the model's attention to ours."""
    install_attention(model)
    input_embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    lm_head = {id(parameter): parameter.numel() for parameter in model.get_output_embeddings().parameters()}
    counted = input_embeddings | lm_head.keys()
    trunk = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)
    return StepBytes(
        trunk=trunk * dtype.itemsize,
        lm_head=sum(lm_head.values()) * dtype.itemsize,
        per_slot=slot_bytes(probe_layer_shapes(model), dtype),
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy within the device that no cache can hold: the median of several."""
    # beside an engine that has taken its share of a small device
    num_bytes = min(_COPY_BYTES[device.type], free_memory_bytes(device) // 2)
    source = torch.ones(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_NUM_COPIES):
        _synchronize(device)
        start_s = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    return 2 * source.nbytes / sorted(seconds)[_NUM_COPIES // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
