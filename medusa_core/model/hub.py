"""Names to local paths: a folder or file that exists is taken as it is, anything else is an id on the model hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from medusa_core.errors import ConfigError, ModelLoadError

_REPO_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_SAFETENSORS = ("*.safetensors",)
_PICKLED = ("*.bin", "*.pt")
# Configs, tokenizers, chat templates, and the code that --trust-remote-code may run.
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "*.py")
# Copies of the weights in forms that are not read.
_IGNORED = ("original/*", "onnx/*", "openvino/*", "*.gguf", "training_args.bin", "optimizer.*", "scheduler.*")


class _SilentBar(tqdm):  # type: ignore[misc]
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def resolve(name: str, *, revision: str | None = None, endpoint: str | None = None, progress: bool = True) -> Path:
    """The local folder or file behind `--model` or `--heads`: a path, a hub id, or a hub file (`owner/repo/file.gguf`).

    endpoint: the hub's address; None leaves it to huggingface_hub.

    Raises ModelLoadError for paths that do not exist and for what the hub does not have or cannot deliver, ConfigError for a
    revision of a local path.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        if revision is not None:
            raise ConfigError(f"{name} is a local path, which has no revision {revision!r}.", hint="Leave the revision out.")
        return path
    parts = name.split("/")
    if len(parts) >= 3 and path.suffix == ".gguf" and _REPO_ID.fullmatch("/".join(parts[:2])):
        return fetch_file("/".join(parts[:2]), "/".join(parts[2:]), revision=revision, endpoint=endpoint, progress=progress)
    if not _REPO_ID.fullmatch(name) or name.startswith((".", "-")) or path.suffix in (".gguf", ".safetensors", ".pt", ".bin"):
        raise ModelLoadError(f"There is no file or folder {name!r}, and it is no hub id.", hint="Check the path.")
    return fetch_snapshot(name, revision=revision, endpoint=endpoint, progress=progress)


def fetch_snapshot(repo_id: str, *, revision: str | None = None, endpoint: str | None = None, progress: bool = True) -> Path:
    """A hub repository's weights, configs and tokenizer, as a local folder. Pickled weights only where there are no safetensors."""
    for weights in (_SAFETENSORS, _PICKLED):
        folder = _download(repo_id, [*weights, *_BESIDE_WEIGHTS], _IGNORED, revision, endpoint, progress)
        if any(True for pattern in weights for _ in folder.glob(pattern)):
            return folder
    raise ModelLoadError(
        f"The hub repository {repo_id} holds no weights (.safetensors, .bin or .pt).",
        hint=f"For a GGUF file, name it: {repo_id}/<file>.gguf.",
    )


def fetch_file(
    repo_id: str, filename: str, *, revision: str | None = None, endpoint: str | None = None, progress: bool = True
) -> Path:
    """One file of a hub repository, as a local path."""
    path = _download(repo_id, [filename], (), revision, endpoint, progress) / filename
    if not path.is_file():
        raise ModelLoadError(f"The hub repository {repo_id} has no file {filename!r}.", hint="Check its list of files.")
    return path


def _download(
    repo_id: str, wanted: Sequence[str], ignored: Sequence[str], revision: str | None, endpoint: str | None, progress: bool
) -> Path:
    """The files that match, from the hub or its local cache. Raises ModelLoadError with a remedy for each way it can fail."""
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            endpoint=endpoint,
            allow_patterns=list(wanted),
            ignore_patterns=list(ignored),
            tqdm_class=None if progress else _SilentBar,
        )
    except GatedRepoError as error:
        raise ModelLoadError(f"{repo_id} is gated on the hub.", hint="Accept its terms there and set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        hint = "Check the spelling; a private repository needs HF_TOKEN."
        raise ModelLoadError(f"There is no folder and no hub repository {repo_id!r}.", hint=hint) from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"The hub repository {repo_id} has no revision {revision!r}.", hint="Check --revision.") from error
    except LocalEntryNotFoundError as error:
        hint = "Check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or give a local folder."
        raise ModelLoadError(f"The hub cannot be reached, and {repo_id} is not in the local cache.", hint=hint) from error
    except HFValidationError as error:
        raise ModelLoadError(f"{repo_id!r} is neither a path nor a hub id.", hint="Check the spelling.") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelLoadError(f"Downloading {repo_id} failed ({error}).", hint="Try again; what has arrived is kept.") from error
    return Path(folder)
