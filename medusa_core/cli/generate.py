"""`medusa generate`: one prompt, streamed, with the figures at the end; `--compare` checks speculation against plain decoding."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import sys
from typing import Annotated

import typer

from medusa_core.cli.compare import first_difference, rescore
from medusa_core.cli.options import (
    DeviceOption,
    DtypeOption,
    EnforceEagerOption,
    HeadsOption,
    MaxModelLenOption,
    ModelOption,
    NoPromptLookupOption,
    RevisionOption,
    TemperatureOption,
    TopPOption,
    TreeOption,
    TrustRemoteCodeOption,
    VerboseOption,
    model_config,
    parse_tree_size,
)
from medusa_core.cli.run import RunReport, run_prompt
from medusa_core.cli.start import start_command
from medusa_core.config import (
    CacheConfig,
    EngineConfig,
    ExecutionConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from medusa_core.errors import ConfigError
from medusa_core.outputs import EngineInfo
from medusa_core.params import SamplingParams


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Random if not given.")] = None,
    model: ModelOption = None,
    heads: HeadsOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    tree: TreeOption = "auto",
    tree_size: Annotated[str, typer.Option(help="Nodes per step, or auto.")] = "auto",
    max_model_len: MaxModelLenOption = None,
    no_prompt_lookup: NoPromptLookupOption = False,
    no_speculation: Annotated[bool, typer.Option("--no-speculation", help="Decode one token per step.")] = False,
    enforce_eager: EnforceEagerOption = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands, without the chat template.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run with and without speculation and compare the tokens.")] = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer one prompt and print speed, acceptance length and steps."""
    start_command(verbose=verbose)
    if compare and no_speculation:
        raise ConfigError("--compare runs with speculation as well, so it cannot be used with --no-speculation.")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}.")
    config = EngineConfig(
        model=model_config(model, heads, revision, dtype, device, max_model_len, trust_remote_code),
        cache=CacheConfig(),
        scheduler=SchedulerConfig(max_num_seqs=1),
        speculation=SpeculationConfig(
            enabled=not no_speculation, prompt_lookup=not no_prompt_lookup, tree=tree, tree_size=parse_tree_size(tree_size)
        ),
        execution=ExecutionConfig(mode="eager" if enforce_eager else "auto"),
    )
    if compare and seed is None:
        seed = secrets.randbits(32)  # both runs must draw the same noise
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens)
    text = sys.stdin.read() if prompt == "-" else prompt
    if compare:
        raise typer.Exit(_compare(config, text, params, is_raw=raw))
    report, _, info = asyncio.run(run_prompt(config, text, params, is_raw=raw, write=_write))
    print(f"\n\n[{_describe(info)}]\n[{report.summary()}]")


def _compare(config: EngineConfig, text: str, params: SamplingParams, *, is_raw: bool) -> int:
    """Exit code: 0 if the tokens are equal, or differ at a near-tie in sixteen bits; else 1."""
    plain_config = dataclasses.replace(config, speculation=dataclasses.replace(config.speculation, enabled=False))
    speculative, prompt_token_ids, info = asyncio.run(run_prompt(config, text, params, is_raw=is_raw, write=_write))
    plain, _, _ = asyncio.run(run_prompt(plain_config, text, params, is_raw=is_raw, write=lambda _: None))
    print(f"\n\n[{_describe(info)}]\n[with speculation: {speculative.summary()}]\n[without: {plain.summary()}]")
    index = first_difference(speculative.token_ids, plain.token_ids)
    if index is None:
        print(f"[compare: all {len(plain.token_ids)} tokens are equal]")
        return 0
    if info.dtype == "float32" or index >= min(len(speculative.token_ids), len(plain.token_ids)):
        print(f"[compare: FAILED, the outputs differ from token {index} on{_excerpt(speculative, plain, index)}]")
        return 1
    score = rescore(config.model, prompt_token_ids, params, speculative.token_ids, plain.token_ids, index)
    verdict = "a near-tie" if score.is_near_tie else "FAILED, not a near-tie"
    print(
        f"[compare: {verdict}: the first {index} tokens are equal; then {score.tokens[0]} against {score.tokens[1]}, "
        f"whose float32 scores differ by {score.gap:.4f} (tolerance {score.tolerance:.4f} in {info.dtype})]"
    )
    return 0 if score.is_near_tie else 1


def _excerpt(speculative: RunReport, plain: RunReport, index: int) -> str:
    return f": {speculative.token_ids[index : index + 4]} against {plain.token_ids[index : index + 4]}"


def _describe(info: EngineInfo) -> str:
    return f"{info.model_name}, {info.dtype} on {info.device}, {info.num_heads} heads, tree {info.tree}, size {info.tree_size}"


def _write(text: str) -> None:
    print(text, end="", flush=True)
