"""What `medusa bench` refuses before anything runs: options that are wrong, and options that would change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer

from medusa_core.bench.prompts import Question, Synthetic, parse_synthetic, read_questions
from medusa_core.bench.server import OfflineReference, read_offline
from medusa_core.bench.throughput import PLAIN, TRANSFORMERS
from medusa_core.errors import ConfigError
from medusa_core.tree.presets import load_tree

# Fields of a request that the benchmark sets itself, and how to set them; None: not at all.
_OWN_FIELDS = {
    "model": "--served-model",
    "messages": "--prompts",
    "max_tokens": "--max-tokens, or --synthetic",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "seed": "--seed",
    "stream": None,
    "stream_options": None,
}


def prompt_source(context: typer.Context) -> tuple[list[Question], Synthetic | None]:
    """What --prompts, --synthetic, --num-prompts and --max-tokens name: questions, or the shape of random prompts."""
    prompts, synthetic = context.params["prompts"], context.params["synthetic"]
    if (prompts is None) == (synthetic is None):
        raise ConfigError("Give either --prompts with a file of questions, or --synthetic INxOUT.")
    if prompts is not None:
        # older releases of typer leave the text here that was typed
        return read_questions(Path(prompts), context.params["num_prompts"]), None
    shape = parse_synthetic(synthetic)
    if is_given(context, "max_tokens"):
        raise ConfigError(
            f"--synthetic {synthetic} says how long answers are, and so does --max-tokens.", hint="Leave --max-tokens out."
        )
    return [], shape


def check_sampling(temperature: float, top_p: float) -> None:
    if temperature == 0 and top_p != 1:
        raise ConfigError(
            f"--top-p {top_p:g} changes nothing in greedy decoding.", hint="Raise --temperature, or leave --top-p out."
        )


def check_tree(tree: str, heads: str | None) -> None:
    """A tree that nothing could fill, or that there is not. The engine sees heads that were not found."""
    if tree != "auto" and load_tree(tree).head_depth > 0 and heads == "none":
        raise ConfigError(f"--tree {tree} needs heads, but --heads is none.", hint="Leave one of them out.")


def check_variants(names: Sequence[str], temperature: float, tree: str, heads: str | None, *, has_lookup: bool) -> None:
    drafting = [name for name in names if name not in (PLAIN, TRANSFORMERS)]
    if TRANSFORMERS in names and temperature != 0:
        raise ConfigError("The variant transformers decodes greedily.", hint="Leave it out, or leave --temperature at 0.")
    if TRANSFORMERS in names and len(names) == 1:
        raise ConfigError("The variant transformers is a yard-stick for others.", hint="Add plain or speculation to --variants.")
    if drafting and heads == "none" and not has_lookup:
        raise ConfigError(
            f"The variant {drafting[0]} needs heads or prompt lookup, but --heads is none.", hint="Use --variants plain."
        )
    if tree != "auto" and not drafting:
        raise ConfigError(
            f"--tree {tree} changes nothing without a tree.", hint="Add speculation to --variants, or leave --tree out."
        )


def offline_reference(path: Path | None, concurrency: Sequence[int]) -> OfflineReference | None:
    """concurrency: closed loops to be run; none for an open one."""
    if path is None:
        return None
    if not concurrency:
        raise ConfigError("--offline compares closed loops, and --request-rate is an open one.", hint="Leave one of them out.")
    reference = read_offline(path)
    if not reference.tokens_per_s.keys() & set(concurrency):
        loads = ",".join(str(load) for load in sorted(reference.tokens_per_s))
        raise ConfigError(f"--offline {path} holds none of the loads of --concurrency.", hint=f"It holds {loads}.")
    return reference


def extra_fields(text: str) -> dict[str, Any]:
    """The object of --extra-body."""
    try:
        fields = msgspec.json.decode(text.encode(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body must be a JSON object: {error}.") from error
    for name in fields.keys() & _OWN_FIELDS.keys():
        option = _OWN_FIELDS[name]
        raise ConfigError(f"--extra-body cannot set {name}.", hint=f"Use {option}." if option else "Leave it out.")
    return fields


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, rather than left at its default."""
    # By name: the enumeration is click's own or a copy in typer, by typer's version.
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
