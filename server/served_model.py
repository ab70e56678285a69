"""The model as routes see it."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_core.outputs import EngineInfo
from medusa_core.text import TextProcessor
from medusa_core.text.tool_formats import ToolFormat
from server.errors import ModelNotFoundError
from server.metrics import EngineMetrics, GenerationMetrics
from server.settings import ServerSettings


def served_names(settings: ServerSettings, info: EngineInfo) -> tuple[str, ...]:
    """Ids under which clients may ask for the model; the first one labels metrics."""
    return tuple(settings.served_model_name) or (info.model_name,)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that has been loaded once; it stays known while its worker restarts.

    names: ids under which clients may ask for it. created: Unix time of loading, for `/v1/models`. tool_format: how it writes tool
    calls, None if it writes none or they are not looked for.
    """

    info: EngineInfo
    text: TextProcessor
    metrics: GenerationMetrics
    engine_metrics: EngineMetrics
    names: tuple[str, ...]
    created: int
    tool_format: ToolFormat | None = None

    def check_name(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names)
            raise ModelNotFoundError(f"The model {name[:200]!r} does not exist.", param="model", hint=f"Served here: {known}.")
