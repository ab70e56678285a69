"""GGUF files as plain transformers folders: dequantised once, converted tokenizer included, cached on disk.

transformers reads GGUF too, but newer versions keep the weights packed, which is slower on a CPU for more than a few rows and
cannot be saved.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AddedToken, AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from medusa_core.errors import ModelLoadError
from medusa_core.model.gguf_families import ROPE_TENSORS, Family, GgufMetadata, build_config, family_of

# Part of the cache key: raise it when a conversion's result changes.
_FORMAT = 1
_SOURCE_FILE = "medusa_source.json"
# llama.cpp's token types: special tokens, and others that are always matched whole.
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4
_TOKEN_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# Ends of turns, which files often leave out of their metadata; llama.cpp recognises them by text as well.
_END_OF_TURN_TOKENS = frozenset({"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"})
_CORRUPT_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


def default_cache_dir() -> Path:
    """Where converted models are kept: `medusa-server` under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa-server"


def source_sha256(folder: Path) -> str | None:
    """SHA-256 of the file a folder was converted from; None for folders that are no conversion of a hashed file."""
    try:
        digest = json.loads((folder / _SOURCE_FILE).read_text()).get("sha256")
    except (OSError, ValueError):
        return None
    return digest if isinstance(digest, str) else None


def cached_conversion(path: Path, cache_dir: Path, dtype: torch.dtype, *, progress: bool = True) -> Path:
    """`convert_gguf` into a folder of `cache_dir` keyed by the file's path, size and time of change; converts at most once."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({error.strerror}).") from error
    key = sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    folder = conversion_folder(cache_dir, path.stem, key, dtype)
    return folder if folder.is_dir() else convert_gguf(path, folder, dtype, progress=progress)


def conversion_folder(cache_dir: Path, name: str, key: str, dtype: torch.dtype) -> Path:
    """The folder of one conversion. `key` is a hex digest that stands for the file."""
    return cache_dir / "models" / f"{name}-{str(dtype).removeprefix('torch.')}-{key[:16]}-v{_FORMAT}"


def convert_gguf(path: Path, out_dir: Path, dtype: torch.dtype, *, progress: bool = True, digest: str | None = None) -> Path:
    """Write weights (safetensors, `dtype`), config, generation config and tokenizer of a GGUF file to `out_dir`, and return it.

    The folder appears complete or not at all. digest: the file's SHA-256 where it is known, kept for `source_sha256`.

    Raises UnsupportedModelError for an architecture that is not supported and ModelLoadError for a truncated or corrupt file.
    """
    with _corruption_reported(path):
        reader = gguf.GGUFReader(path)
        metadata = _read_metadata(reader)
    family = family_of(metadata)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".partial-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        with _corruption_reported(path):
            state = _state_dict(reader, family, metadata, dtype, progress)
            config = AutoConfig.for_model(**build_config(metadata, vocab_size=state["model.embed_tokens.weight"].shape[0]))
        _save_tokenizer(path, metadata, folder)
        config.save_pretrained(folder)
        eos_ids = _eos_token_ids(metadata)
        GenerationConfig(eos_token_id=eos_ids or None, bos_token_id=config.bos_token_id).save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / _SOURCE_FILE).write_text(json.dumps({"sha256": digest, "file": path.name}))
        _publish(folder, out_dir)
    return out_dir


def _publish(folder: Path, out_dir: Path) -> None:
    try:
        folder.rename(out_dir)
    except OSError:
        # Another process converted the same file meanwhile; its folder is complete, since it was renamed like this one.
        if not out_dir.is_dir():
            raise
        shutil.rmtree(folder)


@contextmanager
def _corruption_reported(path: Path) -> Iterator[None]:
    """The GGUF reader has no errors of its own: broken files surface as whatever numpy or the tokenizer trips over."""
    try:
        yield
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({error}).") from error
    except _CORRUPT_ERRORS as error:
        raise ModelLoadError(
            f"{path} is no valid GGUF file, or it is truncated ({type(error).__name__}: {error}).", hint="Fetch it again."
        ) from error


def _read_metadata(reader: gguf.GGUFReader) -> GgufMetadata:
    # Vocabulary and merges are long, and the tokenizer's own reader wants them.
    long_lists = ("tokenizer.ggml.merges", "tokenizer.ggml.scores")
    fields = {name: field.contents() for name, field in reader.fields.items() if name not in long_lists}
    rope = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors if t.name in ROPE_TENSORS}
    return GgufMetadata(fields, rope, frozenset(tensor.name for tensor in reader.tensors))


def _state_dict(
    reader: gguf.GGUFReader, family: Family, metadata: GgufMetadata, dtype: torch.dtype, progress: bool
) -> dict[str, Tensor]:
    state = {}
    for tensor in tqdm(reader.tensors, desc="Dequantising", unit="tensor", disable=not progress):
        if tensor.name in ROPE_TENSORS:
            continue
        if (name := family.tensor_name(tensor.name)) is None:
            raise ModelLoadError(f"The GGUF file holds a tensor {tensor.name!r} that {metadata.architecture} models do not have.")
        values = family.restore(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type), metadata)
        state[name] = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(dtype)
    if "model.embed_tokens.weight" not in state:
        raise ModelLoadError("The GGUF file has no token_embd.weight tensor.", hint="Use the first file of a split model.")
    return state


def _save_tokenizer(path: Path, metadata: GgufMetadata, folder: Path) -> None:
    """Convert the tokenizer with transformers' reader, then restate what its versions disagree on: added tokens and their roles."""
    try:
        # The generic class: the automatic choice of one wants a config, and knows fewer architectures.
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    except (*_CORRUPT_ERRORS, ImportError) as error:
        raise ModelLoadError(f"The tokenizer in {path} cannot be converted ({error}).", hint="Upgrade transformers.") from error
    tokens = metadata.field("tokenizer.ggml.tokens", [])
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind == _CONTROL_TOKEN)
            for text, kind in zip(tokens, metadata.field("tokenizer.ggml.token_type", []), strict=False)
            if kind in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN) and text in vocabulary
        ]
    )
    for role, key in _TOKEN_ROLES.items():
        token_id = metadata.field(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, role, None if token_id is None else tokens[token_id])
    tokenizer.save_pretrained(folder)


def _eos_token_ids(metadata: GgufMetadata) -> list[int]:
    """EOS, and every control token that ends a turn."""
    named = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = {metadata.field(f"tokenizer.ggml.{key}") for key in named} - {None}
    tokens = metadata.field("tokenizer.ggml.tokens", [])
    types = metadata.field("tokenizer.ggml.token_type", [])
    ids |= {
        i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL_TOKEN and text in _END_OF_TURN_TOKENS
    }
    return sorted(ids)
