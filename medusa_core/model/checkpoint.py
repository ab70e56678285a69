"""Heads from files: every published layout of Medusa heads and our own, told apart by the tensors themselves.

Layouts (h head, l block, n = number of blocks)::

    FasterDecoding, TGI    [medusa_head[s].]{h}.{l}.linear.weight|bias   [medusa_head[s].]{h}.{n}.weight (own lm_head, optional)
    Medusa-2, ModelOpt     the same with the prefix, among the base model's own tensors
    vLLM                   blocks.{h}.layers.{l}.weight|bias   lm_heads.{h}.weight or lm_head.weight   token_map
    ours                   the parameters of `SequentialHeads`, see model/sequential_layout.py   token_map
Counts in config files are not read: the most used checkpoint states the wrong number of heads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from medusa_core.config import ModelConfig
from medusa_core.errors import HeadsMismatchError, ModelLoadError
from medusa_core.model import demo, hub
from medusa_core.model.heads import DraftHeads, MedusaHeads
from medusa_core.model.loader import LoadedModel
from medusa_core.model.projection import Projection
from medusa_core.model.sequential_heads import SequentialHeads
from medusa_core.model.sequential_layout import build_sequential, is_sequential_layout
from medusa_core.model.weights import TensorFile, open_tensor_files

logger = logging.getLogger(__name__)

# Vocabularies above this size are projected slowly enough (reading lm_head) that drafting from their first ids only pays: ids of
# a BPE vocabulary are its merges in order of frequency.
DRAFT_VOCAB_SIZE = 32_768

_WRONG_HEADS = "Use heads that were trained for this model (--heads), or --heads none."
_OWN_FILE_SUFFIXES = ("safetensors", "pt")
_PREFIX = re.compile(r"medusa_heads?\.")
_BLOCK = re.compile(r"(?:medusa_heads?\.)?(?P<head>\d+)\.(?P<layer>\d+)\.linear\.(?P<kind>weight|bias)")
_OWN_LM_HEAD = re.compile(r"(?:medusa_heads?\.)?(?P<head>\d+)\.(?P<layer>\d+)\.weight")
_VLLM_BLOCK = re.compile(r"blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<kind>weight|bias)")
_VLLM_LM_HEAD = re.compile(r"lm_heads\.(?P<head>\d+)\.weight")


@dataclass
class _HeadTensors:
    """Tensors of a checkpoint by role. Keys: (head, layer) for blocks, head for output layers. Names are kept for messages."""

    weights: dict[tuple[int, int], tuple[str, Tensor]] = field(default_factory=dict)
    biases: dict[tuple[int, int], tuple[str, Tensor]] = field(default_factory=dict)
    lm_heads: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    # Position of the own lm_head in its head's Sequential, which is the number of blocks before it.
    lm_head_layers: set[int] = field(default_factory=set)
    shared_lm_head: tuple[str, Tensor] | None = None
    token_map: tuple[str, Tensor] | None = None
    unknown: list[str] = field(default_factory=list)

    def add(self, name: str, read: Callable[[str], Tensor]) -> None:
        if match := _BLOCK.fullmatch(name) or _VLLM_BLOCK.fullmatch(name):
            blocks = self.weights if match["kind"] == "weight" else self.biases
            blocks[int(match["head"]), int(match["layer"])] = (name, read(name))
        elif match := _OWN_LM_HEAD.fullmatch(name):
            self.lm_heads[int(match["head"])] = (name, read(name))
            self.lm_head_layers.add(int(match["layer"]))
        elif match := _VLLM_LM_HEAD.fullmatch(name):
            self.lm_heads[int(match["head"])] = (name, read(name))
        elif name == "lm_head.weight":
            self.shared_lm_head = (name, read(name))
        elif name == "token_map":
            self.token_map = (name, read(name))
        else:
            self.unknown.append(name)


def find_heads(config: ModelConfig, loaded: LoadedModel, *, progress: bool = True) -> Path | None:
    """Where the heads of `config` are: the file or folder it names, the demo model's, or beside the model. None: there are none.

    Raises ModelLoadError where heads are named that do not exist.
    """
    if config.heads == "none":
        return None
    if config.heads is not None:
        return hub.resolve(config.heads, revision=config.heads_revision, progress=progress)
    if config.model is None:
        return demo.demo_heads_path()
    if has_heads(loaded.folder):
        return loaded.folder
    beside_file = (Path(config.model).expanduser().parent / f"medusa_lm_head.{suffix}" for suffix in _OWN_FILE_SUFFIXES)
    return next((path for path in beside_file if config.model.endswith(".gguf") and path.is_file()), None)


def load_heads(source: Path, loaded: LoadedModel, *, draft_vocab_size: int | None = DRAFT_VOCAB_SIZE) -> DraftHeads:
    """The heads in `source` (a file, or a folder as `find_heads_files` reads it), in the base model's dtype and on its device.

    draft_vocab_size: heads that share the base lm_head, without a correction of it, and bring no token map draft from the first so
        many ids; None or a number not below the vocabulary drafts from all.

    Raises ModelLoadError for files that cannot be read and HeadsMismatchError for tensors that do not fit the base model.
    """
    with open_tensor_files(find_heads_files(source)) as files:
        _warn_of_other_base(files, loaded, source)
        names = {name: file for file in files for name in file.names}
        heads: DraftHeads
        if is_sequential_layout(names):
            heads = _sequential(names, loaded, draft_vocab_size)
        else:
            heads = _medusa(files, loaded, draft_vocab_size, source)
    logger.info("Loaded %d heads (%d block(s), %s) from %s.", heads.num_heads, heads.num_layers, heads.layout, source)
    return heads.requires_grad_(False).eval()


def _sequential(names: Mapping[str, TensorFile], loaded: LoadedModel, draft_vocab_size: int | None) -> SequentialHeads:
    tensors = {name: file.read(name) for name, file in names.items()}
    token_map_V = None
    if "token_map" in tensors:
        token_map_V = _checked_token_map("token_map", tensors.pop("token_map"), loaded)
    heads = build_sequential(tensors, token_map_V, loaded)
    if heads.own is None and heads.correction is None:
        heads.token_map_V, heads.draft_projection = _restricted(token_map_V, loaded, draft_vocab_size)
    elif heads.own is None and heads.vocab_size < loaded.vocab_size:
        rows_V = torch.arange(heads.vocab_size) if token_map_V is None else token_map_V
        heads.draft_projection = loaded.project.restricted_to(rows_V)
    return heads


def _medusa(files: Iterable[TensorFile], loaded: LoadedModel, draft_vocab_size: int | None, source: Path) -> MedusaHeads:
    tensors = _HeadTensors()
    _collect(files, tensors)
    if tensors.unknown:
        raise HeadsMismatchError(
            f"{source} holds tensors that are no Medusa heads: {_shorten(tensors.unknown)}.", hint=_WRONG_HEADS
        )
    if not tensors.weights:
        raise HeadsMismatchError(f"{source} holds no Medusa heads (no tensor like 0.0.linear.weight).", hint=_WRONG_HEADS)
    return _Builder(tensors, loaded).build(draft_vocab_size)


def find_heads_files(source: Path) -> list[Path]:
    """The tensor files of a heads file or folder: `medusa_lm_head.*` first, else all safetensors, else all pickled files.

    Raises ModelLoadError when there are none.
    """
    if source.is_file():
        return [source]
    for pattern in ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "*.safetensors", "*.pt", "*.bin"):
        if files := sorted(source.glob(pattern)):
            return files
    raise ModelLoadError(f"{source} holds no Medusa heads (no .safetensors, .pt or .bin file).")


def has_heads(folder: Path) -> bool:
    """True if a model's folder holds Medusa heads as well, as a file of their own or among the model's tensors."""
    if any((folder / f"medusa_lm_head.{suffix}").is_file() for suffix in _OWN_FILE_SUFFIXES):
        return True
    shards = sorted(folder.glob("*.safetensors"))
    with open_tensor_files(shards) as files:
        return any(_PREFIX.match(name) for file in files for name in file.names)


def _collect(files: Iterable[TensorFile], tensors: _HeadTensors) -> None:
    names = [(name, file) for file in files for name in file.names]
    # With the prefix, other names are the base model's own (Medusa-2 merged shards): not heads, and not an error.
    prefixed = [(name, file) for name, file in names if _PREFIX.match(name)]
    for name, file in prefixed or names:
        tensors.add(name, file.read)


def _warn_of_other_base(files: Iterable[TensorFile], loaded: LoadedModel, source: Path) -> None:
    for file in files:
        trained_for = file.metadata.get("base_sha256")
        if trained_for and loaded.source_sha256 and trained_for != loaded.source_sha256:
            logger.warning(
                "%s was trained for the base model with SHA-256 %s..., this one has %s...: expect few accepted tokens.",
                source,
                trained_for[:12],
                loaded.source_sha256[:12],
            )


def _shorten(names: list[str], limit: int = 5) -> str:
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def _mismatch(message: str) -> NoReturn:
    raise HeadsMismatchError(message, hint=_WRONG_HEADS)


def _checked_token_map(name: str, token_map: Tensor, loaded: LoadedModel) -> Tensor:
    if token_map.ndim != 1 or token_map.is_floating_point():
        _mismatch(f"Heads tensor {name} is {token_map.dtype} {list(token_map.shape)}, it must be a list of token ids.")
    if not len(token_map) or int(token_map.min()) < 0 or int(token_map.max()) >= loaded.vocab_size:
        _mismatch(f"Heads tensor {name} holds token ids outside the base vocabulary of {loaded.vocab_size}.")
    return token_map.to(device=loaded.device, dtype=torch.int64)


def _restricted(
    token_map_V: Tensor | None, loaded: LoadedModel, draft_vocab_size: int | None
) -> tuple[Tensor | None, Projection | None]:
    """Token map and projection of heads that use the base model's output layer; (None, None) means all of it."""
    project = loaded.project
    if token_map_V is not None:
        return token_map_V, project.restricted_to(token_map_V)
    if draft_vocab_size is not None and draft_vocab_size < loaded.vocab_size and isinstance(project.linear, nn.Linear):
        return None, project.restricted_to(torch.arange(draft_vocab_size))
    return None, None


class _Builder:
    """Checks the tensors of one checkpoint against a base model and stacks them."""

    def __init__(self, tensors: _HeadTensors, loaded: LoadedModel) -> None:
        self.tensors = tensors
        self.loaded = loaded
        self.hidden_size = loaded.hidden_size
        self.num_heads = 1 + max(head for head, _ in tensors.weights)
        self.num_layers = 1 + max(layer for _, layer in tensors.weights)

    def build(self, draft_vocab_size: int | None) -> MedusaHeads:
        weight_LKEE, bias_LKE = self._blocks()
        token_map_V = self._token_map()
        lm_head_KVE = self._own_lm_heads(token_map_V)
        draft_projection = None
        if lm_head_KVE is None:
            token_map_V, draft_projection = self._shared_output(token_map_V, draft_vocab_size)
        return MedusaHeads(
            weight_LKEE, bias_LKE, lm_head_KVE=lm_head_KVE, draft_projection=draft_projection, token_map_V=token_map_V
        )

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.loaded.device, dtype=self.loaded.dtype)

    def _checked(self, entry: tuple[str, Tensor], *expected: int) -> Tensor:
        name, tensor = entry
        if tuple(tensor.shape) != expected:
            _mismatch(
                f"Heads tensor {name} has shape {list(tensor.shape)}, the base model {self.loaded.name} needs {list(expected)}."
            )
        return self._place(tensor)

    def _blocks(self) -> tuple[Tensor, Tensor | None]:
        tensors, E = self.tensors, self.hidden_size
        grid = [[(head, layer) for head in range(self.num_heads)] for layer in range(self.num_layers)]
        for blocks, kind in ((tensors.weights, "weight"), (tensors.biases, "bias")):
            missing = [f"{head}.{layer} ({kind})" for row in grid for head, layer in row if (head, layer) not in blocks]
            if blocks and missing:
                _mismatch(f"The heads are incomplete: no linear for head.block {_shorten(missing)}.")
        weight_LKEE = torch.stack([torch.stack([self._checked(tensors.weights[at], E, E) for at in row]) for row in grid])
        bias_LKE = None
        if tensors.biases:
            bias_LKE = torch.stack([torch.stack([self._checked(tensors.biases[at], E) for at in row]) for row in grid])
        if self._has_tied_layers():
            times = max(tensors.lm_head_layers)
            weight_LKEE = weight_LKEE.expand(times, -1, -1, -1)
            bias_LKE = None if bias_LKE is None else bias_LKE.expand(times, -1, -1)
        return weight_LKEE, bias_LKE

    def _has_tied_layers(self) -> bool:
        """True when one block stands for several: `[ResBlock()] * n` repeats one module, of which safetensors keeps one copy."""
        positions = self.tensors.lm_head_layers
        if positions and positions != {self.num_layers} and (self.num_layers != 1 or len(positions) != 1 or 0 in positions):
            _mismatch(f"The heads have {self.num_layers} blocks, but output layers at positions {sorted(positions)}.")
        return bool(positions) and positions != {self.num_layers}

    def _own_lm_heads(self, token_map_V: Tensor | None) -> Tensor | None:
        """[K, V', E], cut at the base vocabulary: rows beyond it are padding no base token can match."""
        lm_heads = self.tensors.lm_heads
        if not lm_heads:
            return None
        missing = [str(head) for head in range(self.num_heads) if head not in lm_heads]
        if missing or len(lm_heads) > self.num_heads:
            _mismatch(f"{self.num_heads} heads have residual blocks, but {len(lm_heads)} have an lm_head.")
        num_rows = lm_heads[0][1].shape[0]
        stacked = torch.stack([self._checked(lm_heads[head], num_rows, self.hidden_size) for head in range(self.num_heads)])
        num_kept = self.loaded.vocab_size if token_map_V is None else len(token_map_V)
        return stacked[:, :num_kept].contiguous() if num_rows > num_kept else stacked

    def _token_map(self) -> Tensor | None:
        if self.tensors.token_map is None:
            return None
        return _checked_token_map(*self.tensors.token_map, self.loaded)

    def _shared_output(self, token_map_V: Tensor | None, draft_vocab_size: int | None) -> tuple[Tensor | None, Projection | None]:
        """Token map and projection of heads that share one output layer; (None, None) means the base model's own projection."""
        project = self.loaded.project
        if (shipped := self._shipped_lm_head(token_map_V)) is not None:
            linear = nn.Linear(self.hidden_size, len(shipped), bias=False, device="meta")
            linear.weight = nn.Parameter(shipped, requires_grad=False)
            return token_map_V, Projection(linear, multiplier=project.multiplier, softcap=project.softcap)
        return _restricted(token_map_V, self.loaded, draft_vocab_size)

    def _shipped_lm_head(self, token_map_V: Tensor | None) -> Tensor | None:
        """The shared lm_head that came with the heads [V', E]; None if there is none or it is the base model's."""
        if self.tensors.shared_lm_head is None:
            return None
        num_rows = self.tensors.shared_lm_head[1].shape[0]
        weight = self._checked(self.tensors.shared_lm_head, num_rows, self.hidden_size)
        if token_map_V is not None and len(token_map_V) > num_rows:
            _mismatch(f"The heads' token map has {len(token_map_V)} entries, but lm_head.weight has only {num_rows} rows.")
        weight = weight[: self.loaded.vocab_size if token_map_V is None else len(token_map_V)]
        base = getattr(self.loaded.project.linear, "weight", None)
        return None if token_map_V is None and base is not None and torch.equal(weight, base) else weight
