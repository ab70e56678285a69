"""Options that several subcommands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medusa_core.config import DtypeName, ModelConfig
from medusa_core.errors import ConfigError

ModelOption = Annotated[str | None, typer.Option("--model", help="Hub id, folder or GGUF file; the demo model if not given.")]
HeadsOption = Annotated[str | None, typer.Option("--heads", help="Hub id, folder or file of Medusa heads; 'none' for no heads.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model on the hub.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
TreeOption = Annotated[str, typer.Option("--tree", help="Preset, JSON file, or auto.")]
NoPromptLookupOption = Annotated[
    bool, typer.Option("--no-prompt-lookup", help="Draft by heads alone, not from the text of prompt and output.")
]
MaxModelLenOption = Annotated[
    int | None, typer.Option("--max-model-len", help="Longest prompt + output; the model's own limit if not given.")
]
TrustRemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model's folder.")]
EnforceEagerOption = Annotated[bool, typer.Option("--enforce-eager", help="Run the plain torch step, not captured kernels.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Nucleus sampling: share of probability kept.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Log what loading does.")]

PromptsOption = Annotated[Path | None, typer.Option("--prompts", help="JSON lines of Spec-Bench's format; first turns are asked.")]
SyntheticOption = Annotated[str | None, typer.Option("--synthetic", help="Random prompts instead: INxOUT tokens, e.g. 128x256.")]
NumPromptsOption = Annotated[
    int | None, typer.Option("--num-prompts", min=1, help="So many, evenly spread over the file; of random ones, 64.")
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens per answer; --synthetic sets its own.")]
BenchSeedOption = Annotated[int, typer.Option("--seed", help="Of random prompts, sampling and arrivals.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Repetitions of every run.")]
PriceOption = Annotated[
    float | None, typer.Option("--price-per-gpu-hour", min=0.0, help="For the price of a million output tokens.")
]
NoPlotsOption = Annotated[bool, typer.Option("--no-plots", help="Draw them later, with medusa bench render.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder for results.json, report.md and plots.")]


def model_config(
    model: str | None,
    heads: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    max_model_len: int | None,
    trust_remote_code: bool,
) -> ModelConfig:
    """Raises ConfigError naming the option."""
    return ModelConfig(
        model=model,
        heads=heads,
        revision=revision,
        dtype=dtype_name(dtype),
        device=device,
        max_model_len=max_model_len,
        trust_remote_code=trust_remote_code,
    )


def dtype_name(name: str) -> DtypeName:
    # checked by ModelConfig, which names the choices
    return name  # type: ignore[return-value]


def parse_tree_size(text: str) -> int | Literal["auto"]:
    """Raises ConfigError for anything but "auto" or a number."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f'--tree-size must be "auto" or a number, got {text!r}.') from None


def number_list(option: str, text: str) -> tuple[int, ...]:
    """Positive whole numbers divided by commas, each once; sorted. Raises ConfigError naming the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} must be positive numbers divided by commas, got {text!r}.")
    numbers = tuple(sorted(int(part) for part in parts))
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"{option} names a number twice: {text}.")
    return numbers
