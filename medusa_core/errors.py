"""Every exception the engine raises on purpose.

::

    MedusaError
    ├── ConfigError                 an option is wrong or options contradict each other
    ├── ModelError                  the base model or its heads cannot be used
    │   ├── ModelLoadError          files missing, truncated, corrupt, unreachable
    │   ├── UnsupportedModelError   a model we cannot serve correctly
    │   └── HeadsMismatchError      heads that do not fit the base model
    ├── RequestError                one request is wrong; nothing else is affected
    │   ├── InvalidParameterError   a field has a wrong value
    │   ├── UnsupportedParameterError  a known field that is not supported yet
    │   ├── PromptError             an empty prompt, or a token id outside the vocabulary
    │   └── ContextLengthError      prompt and requested tokens exceed the model's context
    ├── CapacityError               the request is fine, the engine has no room now
    │   ├── QueueFullError
    │   └── DrainingError           the server is shutting down
    └── EngineError                 the engine failed
        ├── EngineDeadError         the worker process died; it is being restarted
        └── EngineNotReadyError     the worker is still loading

Each class has a stable `code` for programs and a message for people: what is wrong, and what to do about it. The core knows no
HTTP status; `server/errors.py` maps these classes to statuses.
"""

from __future__ import annotations


class MedusaError(Exception):
    """Base of all errors raised on purpose. `code` is stable; `hint` says what to do, and is part of `str(error)`."""

    code = "medusa_error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} {hint}")
        self.hint = hint


class ConfigError(MedusaError):
    """An option is wrong. The message names the option and the remedy."""

    code = "invalid_config"


class ModelError(MedusaError):
    """The base model or its heads cannot be used."""

    code = "model_error"


class ModelLoadError(ModelError):
    """Files are missing, truncated, corrupt or unreachable."""

    code = "model_load_failed"


class UnsupportedModelError(ModelError):
    """The model would not be served correctly; the message says why."""

    code = "unsupported_model"


class HeadsMismatchError(ModelError):
    """The Medusa heads do not fit the base model."""

    code = "heads_mismatch"


class RequestError(MedusaError):
    """One request is wrong. `param` names the field of the API the caller used, or is None."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class InvalidParameterError(RequestError):
    """A field has a value outside its range."""

    code = "invalid_value"


class UnsupportedParameterError(RequestError):
    """A known field that this version does not support."""

    code = "unsupported_parameter"


class PromptError(RequestError):
    """The prompt is empty or holds a token id outside the vocabulary."""

    code = "invalid_prompt"


class ContextLengthError(RequestError):
    """The prompt, with the tokens requested, exceeds the model's context."""

    code = "context_length_exceeded"


class CapacityError(MedusaError):
    """The request is fine but there is no room for it now; trying again later can succeed."""

    code = "server_overloaded"


class QueueFullError(CapacityError):
    """The engine's queue of waiting requests is full."""


class DrainingError(CapacityError):
    """The server is shutting down and takes no new requests."""

    code = "server_draining"


class EngineError(MedusaError):
    """The engine failed; requests it held have ended."""

    code = "engine_error"


class EngineDeadError(EngineError):
    """The engine's process died. It is restarted; requests it held are lost."""

    code = "engine_dead"


class EngineNotReadyError(EngineError):
    """The engine is still loading, or restarting."""

    code = "engine_not_ready"
