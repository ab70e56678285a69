"""What is known of one HTTP request: collected on its way, told in the access log and in traces."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.generation import Generation
    from server.protocol.common import GenerationBody

_SCOPE_KEY = "medusa.request"


@dataclass(slots=True)
class RequestInfo:
    """Lives in the ASGI scope. arrival_s: `time.monotonic()`. key_name: whose API key it came with. error_code: of the error it was
    answered with. headers: for its answer, whatever that will be. body, generation: of a request that reached the engine's client,
    and the id that its answer carries. trace_id: of its span, if it has one."""

    request_id: str
    arrival_s: float
    key_name: str | None = None
    error_code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: GenerationBody | None = None
    generation: Generation | None = None
    reply_id: str | None = None
    trace_id: str | None = None

    def attach(self, scope: MutableMapping[str, Any]) -> RequestInfo:
        scope[_SCOPE_KEY] = self
        return self

    @property
    def num_charged_tokens(self) -> int:
        """Tokens of prompts that were computed and of completions."""
        return 0 if self.generation is None else self.generation.num_charged_tokens


def request_info(scope: MutableMapping[str, Any]) -> RequestInfo:
    """Of a request that came through `ObservabilityMiddleware`."""
    info: RequestInfo = scope[_SCOPE_KEY]
    return info


def note_error(scope: MutableMapping[str, Any], code: str | None) -> None:
    """The answer is an error with this code. An app without the middleware keeps no such notes."""
    info: RequestInfo | None = scope.get(_SCOPE_KEY)
    if info is not None:
        info.error_code = code


def route_path(scope: MutableMapping[str, Any]) -> str:
    """The path as routes know it: below the prefix under which the app is mounted, as behind Ray Serve."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
