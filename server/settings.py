"""The server's options: one declaration gives flags, `MEDUSA_*` variables, help and validation. Flags win over variables."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from medusa_core.config import (
    CacheConfig,
    DtypeName,
    EngineConfig,
    ExecutionConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from medusa_core.engine.logs import LogFormat
from medusa_core.errors import ConfigError
from server.keys import Keyring, hashed
from server.limits import KeyLimits

PROGRAM = "medusa-server"


def _split(value: object) -> object:
    """Flags give lists; a variable gives one string, separated by commas or blanks. An empty one is a variable that somebody forgot
    to fill: without keys, the server would be open to everybody."""
    if not isinstance(value, str):
        return value
    names = tuple(value.replace(",", " ").split())
    if not names:
        raise PydanticCustomError("empty_name", "Values must not be empty; leave the variable out for none")
    return names


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """An empty one is a variable that the shell had not set."""
    if not all(name.strip() for name in names):
        raise PydanticCustomError("empty_name", "Values must not be empty")
    return names


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_check_names)]


def _hash_keys(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Plain keys do not outlive the reading of the options."""
    try:
        return tuple(hashed(entry) for entry in entries)
    except ValueError as error:
        raise PydanticCustomError("invalid_key", "{message}", {"message": str(error)}) from error


Keys = Annotated[Names, AfterValidator(_hash_keys)]
PerKey = Annotated[int | None, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ServerSettings(BaseSettings):
    """Options of `medusa-server`. Every field is a flag (`max_num_seqs`: --max-num-seqs) and a variable (MEDUSA_MAX_NUM_SEQS)."""

    model_config = SettingsConfigDict(env_prefix="MEDUSA_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for all interfaces")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_workers: int = Field(1, ge=1, le=64, description="processes that answer HTTP, before one engine; more where one is busy")

    model: str | None = Field(None, description="hub id, local folder or GGUF file; without it the demo model")
    heads: str | None = Field(None, description="hub id, folder or file with Medusa heads; 'none' serves without heads")
    revision: str | None = Field(None, description="branch, tag or commit of the model on the hub")
    heads_revision: str | None = Field(None, description="branch, tag or commit of the heads on the hub")
    dtype: DtypeName = Field("auto", description="number format of the weights; auto takes bfloat16 where it is fast")
    device: str = Field("auto", description="torch device, such as cpu or cuda:0; auto takes a GPU if there is one")
    max_model_len: int | None = Field(
        None, description="most tokens of prompt and output together; default is the model's own limit"
    )
    served_model_name: Names = Field((), description="names under which clients ask for the model; the first one labels metrics")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model's files")
    chat_template: str | None = Field(None, description="Jinja chat template, or a file with one, instead of the model's own")
    tool_call_parser: Literal["auto", "none", "hermes"] = Field(
        "auto", description="format in which the model writes tool calls; auto looks at the chat template"
    )

    api_key: Keys = Field(
        (),
        description="key that clients must send as a bearer token, as KEY or sha256:DIGEST, or NAME= and either; may be repeated",
    )
    api_key_file: str | None = Field(
        None, description="TOML file with a table of key and limits per name; read again when it changes"
    )
    key_requests_per_minute: PerKey = Field(None, description="most requests per key and minute; more are answered with 429")
    key_tokens_per_minute: PerKey = Field(None, description="most tokens of prompts and completions per key and minute")
    key_parallel_requests: PerKey = Field(None, description="most requests of a key at once")
    isolate_keys: bool = Field(
        False, description="reuse the KV of prompts that begin alike only between requests of one key's name"
    )
    cors_origin: Names = Field((), description="origin whose web pages may call the server; may be repeated; '*' for all")
    max_body_bytes: int = Field(2_097_152, ge=1, description="largest request body; larger ones are answered with 413")
    receive_timeout_s: Seconds = Field(
        60, gt=0, description="seconds that a client may take to send headers, and as many for the body"
    )
    keep_alive_timeout_s: int = Field(5, ge=1, description="seconds that a connection may be idle between requests")
    allow_unknown_fields: bool = Field(False, description="ignore unknown fields of requests instead of answering 400")
    drain_timeout_s: Seconds = Field(60, description="seconds that running requests may take to end after SIGTERM")
    no_vllm_metrics: bool = Field(False, description="leave out of /metrics what repeats ours under vLLM's names")
    sse_ping_s: Seconds = Field(0, description="seconds between comment lines in idle streams; 0 sends none")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe messages that are logged")
    log_format: LogFormat = Field("text", description="lines for people, or a JSON object per line; of both processes")
    otlp_traces_endpoint: str | None = Field(
        None, description="send a trace of each request to this URL, such as http://collector:4318/v1/traces; needs the extra otel"
    )
    no_access_log: bool = Field(False, description="do not log a line per request")

    max_num_seqs: int = Field(256, description="choices that run at once")
    max_queued_requests: int = Field(1024, description="choices that may wait; more are answered with 503")
    max_step_tokens: int = Field(512, description="most prompt tokens computed in one step")
    max_steps_in_flight: int | None = Field(
        None, description="steps launched before the oldest one's result is read: 0 or 1; default is 1 on a GPU, 0 on a CPU"
    )
    enforce_eager: bool = Field(False, description="run the plain torch step instead of captured kernels; the output is the same")
    block_size: int = Field(16, description="tokens per block of the KV cache")
    num_blocks: int | None = Field(None, description="blocks of the KV cache; default is measured from free memory")
    memory_fraction: float = Field(0.85, description="share of free memory that the KV cache may take")
    no_prefix_cache: bool = Field(False, description="do not reuse the KV of prompts that begin alike")

    tree: str = Field(
        "auto", description="name of a published tree, or a JSON file; auto searches the best one for the heads' accuracies"
    )
    tree_size: int | Literal["auto"] = Field("auto", description="nodes per step, root included; auto chooses from measured costs")
    no_prompt_lookup: bool = Field(
        False, description="draft by heads alone, not from the text of prompt and output; the output is the same"
    )
    no_speculation: bool = Field(False, description="decode one token per step; the output is the same")

    def keyring(self) -> Keyring:
        """The keys that clients may use, and their limits. Raises ConfigError."""
        limits = KeyLimits(
            requests_per_minute=self.key_requests_per_minute,
            tokens_per_minute=self.key_tokens_per_minute,
            parallel_requests=self.key_parallel_requests,
        )
        keyring = Keyring(self.api_key, self.api_key_file, limits=limits)
        if self.isolate_keys and not keyring.is_used:
            raise ConfigError(
                "--isolate-keys needs keys: without, clients cannot be told apart.", hint="Give --api-key or --api-key-file."
            )
        return keyring

    def engine_config(self) -> EngineConfig:
        """The engine's part of the options. Raises ConfigError."""
        return EngineConfig(
            model=ModelConfig(
                model=self.model,
                revision=self.revision,
                heads=self.heads,
                heads_revision=self.heads_revision,
                dtype=self.dtype,
                device=self.device,
                max_model_len=self.max_model_len,
                trust_remote_code=self.trust_remote_code,
            ),
            cache=CacheConfig(
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                memory_fraction=self.memory_fraction,
                enable_prefix_cache=not self.no_prefix_cache,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_step_tokens=self.max_step_tokens,
                max_step_rows=max(SchedulerConfig().max_step_rows, self.max_num_seqs),
                max_queued_requests=self.max_queued_requests,
                max_steps_in_flight=self.max_steps_in_flight,
            ),
            speculation=SpeculationConfig(
                enabled=not self.no_speculation,
                prompt_lookup=not self.no_prompt_lookup,
                tree=self.tree,
                tree_size=self.tree_size,
            ),
            execution=ExecutionConfig(mode="eager" if self.enforce_eager else "auto"),
        )


def load_settings(arguments: Sequence[str]) -> ServerSettings:
    """Settings from command-line arguments, then `MEDUSA_*` variables, then defaults.

    Raises ConfigError naming the first wrong option. Unknown flags and --help end the process, as argparse does, with a sentence.
    """
    return check_settings(vars(_parser().parse_args(arguments)))


def check_settings(given: Mapping[str, Any]) -> ServerSettings:
    """Settings from values by field name, then variables, then defaults. Raises ConfigError naming the first wrong option."""
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = str(detail["loc"][0])
        # Messages of pydantic end without a full stop. Keys are not for logs.
        shown = "" if name == "api_key" else f", got {detail['input']!r}"
        raise ConfigError(f"{_flag(name)} (or MEDUSA_{name.upper()}): {detail['msg']}{shown}.") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{PROGRAM}: {message}; see {PROGRAM} --help.\n")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    """One flag per field. Values stay text: pydantic converts and checks them, and flags that are absent leave no value."""
    parser = _Parser(
        prog=PROGRAM,
        description="OpenAI-compatible server for language models with Medusa heads.",
        epilog="Every option can also be set as a variable: --max-num-seqs as MEDUSA_MAX_NUM_SEQS. Flags win.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in ServerSettings.model_fields.items():
        parser.add_argument(_flag(name), dest=name, help=_help(field), **_arity(field))
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _arity(field: FieldInfo) -> dict[str, Any]:
    if field.annotation is bool:
        return {"action": "store_true"}
    metavar = _metavar(field.annotation)
    # Several values at once or the flag repeated, as people like it.
    return {"nargs": "+", "action": "extend", "metavar": metavar} if get_origin(field.annotation) is tuple else {"metavar": metavar}


def _metavar(annotation: Any) -> str:
    """`int | None` as INT, `Literal["a", "b"]` as a|b."""
    arguments = [argument for argument in get_args(annotation) if argument is not type(None) and argument is not Ellipsis]
    if get_origin(annotation) is Literal:
        return "|".join(arguments)
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return "|".join(_metavar(argument) for argument in arguments)
    return str(annotation.__name__).upper()


def _help(field: FieldInfo) -> str:
    has_default = field.default is not None and field.default is not False and field.default != ()
    default = f" (default: {field.default})" if has_default else ""
    return f"{field.description}{default}".replace("%", "%%")
