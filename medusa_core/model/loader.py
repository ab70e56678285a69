"""The base model: from `--model` to a module on its device, checked and ready to run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from medusa_core.config import ModelConfig
from medusa_core.errors import ConfigError, ModelLoadError
from medusa_core.model import demo, gguf, guard, hub
from medusa_core.model.device import choose_device, choose_dtype
from medusa_core.model.projection import Projection, build_projection, check_projection

logger = logging.getLogger(__name__)

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A base model that has passed the guard.

    model: eval mode, no gradients, eager attention; on `device` in `dtype`.
    project: hidden states behind the final norm to float32 logits.
    folder: holds config and tokenizer.
    name: hub id, folder or file name without suffix.
    max_model_len: tokens of prompt and output together.
    vocab_size: width of the logits, padding included.
    eos_token_ids: sorted; empty if the model names none.
    source_sha256: of the GGUF file the model was converted from, where known.
    """

    model: PreTrainedModel
    project: Projection
    folder: Path
    name: str
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    source_sha256: str | None = None

    @property
    def base_model(self) -> nn.Module:
        """The trunk: token ids and positions to hidden states behind the final norm."""
        trunk: nn.Module = getattr(self.model, self.model.base_model_prefix)
        return trunk

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)


def load_model(config: ModelConfig, *, progress: bool = True, cache_dir: Path | None = None) -> LoadedModel:
    """Find, convert if needed, and load the model of `config`.

    cache_dir: where converted GGUF files are kept; None is `gguf.default_cache_dir()`.

    Raises ConfigError for options that do not fit the model or the machine, ModelLoadError for files that are missing or broken,
    UnsupportedModelError for models that would not be served correctly.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    folder, name = _locate(config, dtype, cache_dir or gguf.default_cache_dir(), progress)
    model_config = _read_config(folder, config.trust_remote_code)
    guard.check_config(model_config)
    max_model_len = _max_model_len(model_config, config.max_model_len)
    _pin_longrope(model_config, max_model_len)
    model = _load_weights(folder, model_config, dtype, device, config.trust_remote_code, progress)
    guard.check_model(model)
    projection = build_projection(model)
    check_projection(model, projection)
    logger.info("Loaded %s: %s on %s, up to %d tokens.", name, str(dtype).removeprefix("torch."), device, max_model_len)
    return LoadedModel(
        model=model,
        project=projection,
        folder=folder,
        name=name,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        vocab_size=projection.num_tokens,
        eos_token_ids=_eos_token_ids(folder, model_config),
        source_sha256=gguf.source_sha256(folder),
    )


def _locate(config: ModelConfig, dtype: torch.dtype, cache_dir: Path, progress: bool) -> tuple[Path, str]:
    """Folder and name of the model."""
    if config.model is None:
        return demo.demo_model_folder(dtype, cache_dir, progress=progress), demo.DEMO_MODEL_NAME
    path = hub.resolve(config.model, revision=config.revision, progress=progress)
    if path.suffix == ".gguf" and path.is_file():
        return gguf.cached_conversion(path, cache_dir, dtype, progress=progress), path.stem
    if not path.is_dir():
        raise ModelLoadError(f"{path} is neither a model folder nor a .gguf file.", hint="Give the folder that holds config.json.")
    is_local = Path(config.model).expanduser().exists()
    return path, path.resolve().name if is_local else config.model


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} holds no config.json.", hint="Give the folder of a transformers model, or a .gguf file.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"The config in {folder} cannot be read ({_first_line(error)}).", hint=_heads_hint(folder)) from error


def _heads_hint(folder: Path) -> str | None:
    """What to do with a folder that holds heads only: its config names the base model, under no model type."""
    try:
        data = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or "medusa_num_heads" not in data:
        return None
    return f"It holds Medusa heads: use --model {data.get('base_model_name_or_path', '<base model>')} --heads <this>."


def _max_model_len(config: PretrainedConfig, requested: int | None) -> int:
    text_config = config.get_text_config()
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    if requested is None:
        if limit is None:
            raise ConfigError(f"{config.model_type} models state no longest sequence.", hint="Set max_model_len.")
        return limit
    if limit is not None and requested > limit:
        raise ConfigError(
            f"max_model_len is {requested}, but the model allows at most {limit} tokens.", hint="Lower max_model_len."
        )
    return requested


def _pin_longrope(config: PretrainedConfig, max_model_len: int) -> None:
    """Let one set of rotary factors stand for both in `longrope` configs.

    The model's code chooses between the two by the longest position of the forward pass, and a packed batch mixes requests: a long
    neighbour would change a short request's answer. Here the longest sequence that may be served decides, once.
    """
    for rope in guard.rope_parameters(config.get_text_config()):
        if rope.get("rope_type") == "longrope":
            chosen = "long_factor" if max_model_len > rope["original_max_position_embeddings"] else "short_factor"
            rope["long_factor"] = rope["short_factor"] = rope[chosen]


def _load_weights(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, progress: bool
) -> PreTrainedModel:
    try:
        with _progress_bars(progress):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"The model in {folder} cannot be loaded ({_first_line(error)}).") from error
    # transformers fills what is missing with random numbers and goes on.
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info.get(problem) or ()):
            raise ModelLoadError(
                f"The weights in {folder} do not fit the config: {problem} {', '.join(names[:3])} ({len(names)} in all)."
            )
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


@contextmanager
def _progress_bars(enabled: bool) -> Iterator[None]:
    """transformers switches its bars for the whole process, so the former state comes back."""
    was_enabled = transformers.utils.logging.is_progress_bar_enabled()
    switches = {True: transformers.utils.logging.enable_progress_bar, False: transformers.utils.logging.disable_progress_bar}
    switches[enabled]()
    try:
        yield
    finally:
        switches[was_enabled]()


def _eos_token_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """EOS ids of the generation config and of the config, which name one or several each."""
    stated = [config.get_text_config().eos_token_id, getattr(config, "eos_token_id", None)]
    if (folder / "generation_config.json").is_file():
        stated.append(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
    ids: set[int] = set()
    for value in stated:
        ids.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return tuple(sorted(ids))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def use_fast_attention(loaded: LoadedModel) -> None:
    """Set the model to torch's fused attention, for long rows; where transformers does not offer it, the plain one stays."""
    try:
        loaded.model.set_attn_implementation("sdpa")
    except ValueError as error:
        logger.info("%s keeps plain attention: %s", loaded.name, error)
