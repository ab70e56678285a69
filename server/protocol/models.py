"""`/v1/models`."""

from __future__ import annotations

import msgspec


class ModelCard(msgspec.Struct, kw_only=True):
    """One served name. `root` is the model behind it; gateways read `max_model_len`."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "medusa"
    root: str
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]
