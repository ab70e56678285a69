"""`/v1/models`."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelCard(msgspec.Struct, kw_only=True):
    """One served name. `root` is the model behind it; gateways read `max_model_len`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "medusa"
    root: str
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]
