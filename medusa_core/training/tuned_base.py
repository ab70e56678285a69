"""The base model while it is trained together with its heads (Medusa-2, arXiv:2401.10774, section 3.2), beside what it was before.

Either low-rank adapters are trained, which can be switched off, or all weights of the decoder, beside a copy of what they were.
The embedding of tokens and the output layer stay as they are.
"""

# Shape suffixes: B rows · T tokens · E hidden

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_core.errors import ConfigError
from medusa_core.model.loader import LoadedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class JointPlan:
    """The second stage of Medusa-2, behind the epochs in which heads learn alone.

    epochs: of both together. lora_rank: of the adapters on all linear layers of the decoder; 0 trains the layers themselves.
    learning_rate: the highest of the base model, which warms up and falls like the heads'. heads_weight: of all heads' losses
    beside the base model's own.
    """

    epochs: int
    lora_rank: int = 32
    learning_rate: float = 2e-4
    heads_weight: float = 0.2

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.lora_rank < 0:
            raise ConfigError("There must be at least one joint epoch, and no negative rank of adapters.")
        if not (0.0 < self.learning_rate < math.inf and 0.0 < self.heads_weight < math.inf):
            raise ConfigError("The base model's learning rate and the weight of the heads must be positive.")


class TunedBase:
    """Changes `loaded.model` in place: it gets adapters, or float32 layers."""

    def __init__(self, loaded: LoadedModel, plan: JointPlan, seed: int) -> None:
        self._loaded = loaded
        self._adapted: Any = None
        self._original: nn.Module | None = None
        if plan.lora_rank:
            self._adapted = _with_adapters(loaded.model, plan.lora_rank, seed)
            self.parameters = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
        else:
            self._original = copy.deepcopy(loaded.base_model)
            self.parameters = _float32_layers(loaded)

    def read(self, token_ids_BT: Tensor, position_ids_BT: Tensor, *, has_started: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, E] behind the final norm, of the model as it was, and of the model as it is now, with gradients.

        They are the same as long as its training has not started."""
        before: AbstractContextManager[Any] = nullcontext() if self._adapted is None else self._adapted.disable_adapter()
        with before, torch.no_grad():
            original_BTE = _hidden(self._original or self._loaded.base_model, token_ids_BT, position_ids_BT)
        if not has_started:
            return original_BTE, original_BTE
        dtype = self._loaded.dtype
        with torch.autocast(self._loaded.device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden_BTE = _hidden(self._loaded.base_model, token_ids_BT, position_ids_BT)
        return original_BTE, hidden_BTE.to(dtype)

    def state_dict(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.parameters]

    def load_state_dict(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state, strict=True):
                parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Write the model as it is now, a folder like any other. It cannot be trained any further afterwards.

        The dtype is that which it was loaded in: in 16 bits, what is too small beside a weight is rounded away."""
        model: PreTrainedModel = self._loaded.model
        if self._adapted is not None:
            model = self._adapted.merge_and_unload()
        model.to(self._loaded.dtype).save_pretrained(folder)


def read_frozen(loaded: LoadedModel, token_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Hidden states [B, T, E] behind the final norm, of a model that is not trained."""
    with torch.no_grad():
        return _hidden(loaded.base_model, token_ids_BT, position_ids_BT)


def _hidden(trunk: nn.Module, token_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    hidden_BTE: Tensor = trunk(input_ids=token_ids_BT, position_ids=position_ids_BT, use_cache=False).last_hidden_state
    return hidden_BTE


def raise_no_peft() -> NoReturn:
    raise ConfigError(
        "Low-rank adapters need the package peft.",
        hint='Install it (pip install ".[train]" in a checkout of medusa-server), or use --lora-rank 0.',
    )


def _with_adapters(model: PreTrainedModel, rank: int, seed: int) -> Any:
    """The model, wrapped; its linear layers but the output layer are replaced in place."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise_no_peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # alpha = rank / 2 as in the training of the published Medusa-2 models
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=max(rank // 2, 1), target_modules="all-linear"))


def _float32_layers(loaded: LoadedModel) -> list[nn.Parameter]:
    """The weights between embedding and output layer, made float32: small steps would be lost in 16 bits."""
    fixed = {id(parameter) for parameter in loaded.model.get_input_embeddings().parameters()}
    parameters = []
    for parameter in loaded.base_model.parameters():
        if id(parameter) not in fixed:
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
            parameters.append(parameter)
    return parameters
