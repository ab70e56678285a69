"""Tensor files behind one interface: safetensors, and pickled files restricted to plain tensors."""

from __future__ import annotations

import pickle
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medusa_core.errors import ModelLoadError


class TensorFile(Protocol):
    """An open file of named tensors. `metadata` is the file's own, empty where the format has none."""

    @property
    def names(self) -> list[str]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        ...


class _Safetensors:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.names: list[str] = list(handle.keys())
        self.metadata: Mapping[str, str] = handle.metadata() or {}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor


class _Pickled:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.names = list(tensors)
        self.metadata: Mapping[str, str] = {}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


@contextmanager
def open_tensor_files(paths: Sequence[Path]) -> Iterator[list[TensorFile]]:
    """Open tensor files for reading; they are closed on exit. Raises ModelLoadError for files that are corrupt or hold code."""
    with ExitStack() as stack:
        yield [_open(path, stack) for path in paths]


def write_tensor_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, as a whole or not at all: a server may have the file that it replaces in its memory.

    Who else may read it is up to the umask; safetensors' own writer allows nobody, and heads are trained by one user and served by
    another.
    """
    partial = path.with_suffix(".partial")
    partial.touch()
    mode = stat.S_IMODE(partial.stat().st_mode)
    save_file(dict(tensors), partial, metadata=dict(metadata))
    partial.chmod(mode)
    partial.replace(path)


def _open(path: Path, stack: ExitStack) -> TensorFile:
    try:
        if path.suffix == ".safetensors":
            return _Safetensors(stack.enter_context(safe_open(path, framework="pt")))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{path} is corrupt, or holds pickled Python objects beside tensors, which are not loaded.",
            hint="Save its tensors as safetensors.",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ModelLoadError(
            f"{path} cannot be read ({_first_line(error)}).", hint="It may be truncated: fetch it again."
        ) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelLoadError(f"{path} is no state dict (a mapping from names to tensors).")
    return _Pickled(loaded)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
