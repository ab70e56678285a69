"""Load on any OpenAI-compatible server, and what it does to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from medusa_core.bench.chat_request import chat_body
from medusa_core.bench.figures import RunFigures, summarise
from medusa_core.bench.http_stream import Address, StreamError
from medusa_core.bench.load import Load, fetch, poisson_arrivals_s, run_load
from medusa_core.bench.prompts import Question
from medusa_core.bench.records import RunRecord
from medusa_core.bench.server_process import (
    ServerFigures,
    ServerView,
    compare_views,
    find_listeners,
    is_local,
    parse_metrics,
    process_cpu_s,
)
from medusa_core.errors import ConfigError, EngineError

VARIANT = "server"
# Settings that both benchmarks have, and that decide what the engine has to do.
_COMPARED_SETTINGS = ("prompts", "synthetic", "num_prompts", "max_tokens", "temperature", "top_p", "seed")
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """concurrency: closed loops, one after the other. request_rate: an open loop instead. extra: further fields of the body.

    server_pids: of the front end; empty where they are unknown.
    """

    address: Address
    model: str
    max_tokens: int
    concurrency: tuple[int, ...] = ()
    request_rate: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    num_processes: int = 4
    repeats: int = 1
    seed: int = 0
    timeout_s: float = 600.0
    price_per_gpu_hour: float | None = None
    server_pids: tuple[int, ...] = ()

    @property
    def num_runs(self) -> int:
        return self.repeats * max(len(self.concurrency), 1)


@dataclass(frozen=True, kw_only=True)
class ServedRun:
    """Figures of one load. offline_share: tokens/s over those of the same variant and load measured offline."""

    figures: RunFigures
    server: ServerFigures
    offline_tokens_per_s: float | None = None
    offline_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class OfflineReference:
    """Tokens per second by load, of one variant of an earlier `medusa bench throughput`, and that run's settings.

    incomplete: as in its report.
    """

    variant: str
    tokens_per_s: dict[int, float]
    settings: dict[str, Any] = field(default_factory=dict)
    incomplete: str | None = None

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """What was asked for otherwise then, in words: a share of such a figure says little."""
        names = [name for name in _COMPARED_SETTINGS if name in self.settings and self.settings[name] != settings.get(name)]
        return [f"{name} was {self.settings[name]}, not {settings.get(name)}" for name in names]


def first_served_model(address: Address, *, api_key: str | None) -> str:
    """The first model that the server lists. Raises EngineError if it cannot be asked, ConfigError if it lists none."""
    try:
        body = msgspec.json.decode(asyncio.run(fetch(address, "/v1/models", api_key=api_key)))
        return str(body["data"][0]["id"])
    except StreamError as error:
        raise EngineError(f"The server at {address.host}:{address.port} does not list its models: {error}") from error
    except (msgspec.DecodeError, KeyError, IndexError, TypeError) as error:
        raise ConfigError("The server lists no model.", hint="Name one with --served-model.") from error


def frontend_pids(address: Address, server_pid: int | None) -> tuple[int, ...]:
    """Whose CPU time is measured: the process given, else those of this machine that listen on the server's port."""
    if server_pid is not None:
        process_cpu_s(server_pid)
        return (server_pid,)
    return tuple(find_listeners(address.port)) if is_local(address.host) else ()


def read_offline(path: Path) -> OfflineReference:
    """Speeds from the results.json of `medusa bench throughput`: of speculation if it ran, else of plain decoding. Raises
    ConfigError."""
    try:
        results = msgspec.json.decode(path.read_bytes())
        runs = results["figures"]["runs"]
        settings, incomplete = results.get("settings") or {}, results.get("incomplete")
        speeds: dict[str, dict[int, float]] = {}
        for run in runs:
            speeds.setdefault(run["variant"], {})[run["concurrency"]] = run["tokens_per_s"]
    except OSError as error:
        raise ConfigError(f"--offline {path}: {error.strerror}.") from error
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--offline {path} holds no results of medusa bench throughput ({error}).") from error
    for variant in ("speculation", "plain"):
        if variant in speeds:
            return OfflineReference(variant=variant, tokens_per_s=speeds[variant], settings=settings, incomplete=incomplete)
    raise ConfigError(f"--offline {path} has neither speculation nor plain decoding.")


def run_server(
    plan: ServerPlan, questions: Sequence[Question], *, offline: OfflineReference | None, progress: bool
) -> Iterator[list[ServedRun]]:
    """Every load in turn, repetitions of one load in a row, after a warm-up. After each run: the figures of all loads so far.

    Failed requests are counted, not raised.
    """
    _warm_up(plan, questions)
    finished: list[ServedRun] = []
    for concurrency in plan.concurrency or (None,):
        before = _view(plan)
        runs = []
        for repetition in range(plan.repeats):
            name = f"{plan.request_rate:g} requests/s" if concurrency is None else f"{concurrency} at once"
            with tqdm(total=len(questions), desc=name, unit="request", disable=not progress) as bar:
                runs.append(_run(plan, questions, concurrency, repetition, bar))
            figures = summarise(runs, price_per_gpu_hour=plan.price_per_gpu_hour)
            served = _compare(figures, compare_views(before, _view(plan), figures.num_frames), offline)
            yield [*finished, served]
        finished.append(served)


def _compare(figures: RunFigures, server: ServerFigures, offline: OfflineReference | None) -> ServedRun:
    reference = None
    if offline is not None and figures.concurrency is not None:
        reference = offline.tokens_per_s.get(figures.concurrency)
    share = figures.tokens_per_s / reference if reference else None
    return ServedRun(figures=figures, server=server, offline_tokens_per_s=reference, offline_share=share)


def _run(plan: ServerPlan, questions: Sequence[Question], concurrency: int | None, repetition: int, bar: Any) -> RunRecord:
    arrivals_s = None
    if concurrency is None:
        assert plan.request_rate is not None
        arrivals_s = poisson_arrivals_s(len(questions), plan.request_rate, plan.seed + repetition)
    return run_load(
        _load(plan, questions, plan.max_tokens, concurrency=concurrency, arrivals_s=arrivals_s),
        num_processes=plan.num_processes,
        variant=VARIANT,
        repetition=repetition,
        request_rate=None if concurrency is not None else plan.request_rate,
        on_progress=bar.update,
    )


def _load(
    plan: ServerPlan,
    questions: Sequence[Question],
    max_tokens: int,
    *,
    concurrency: int | None = None,
    arrivals_s: list[float] | None = None,
) -> Load:
    bodies = [
        # Greedy requests ignore the seed; for sampled ones it is the prompt's own, as offline.
        chat_body(question.text, model=plan.model, max_tokens=max_tokens, extra={"seed": plan.seed + number, **plan.extra})
        for number, question in enumerate(questions)
    ]
    return Load(
        address=plan.address,
        bodies=bodies,
        categories=[question.category for question in questions],
        concurrency=concurrency,
        arrivals_s=arrivals_s,
        api_key=plan.api_key,
        timeout_s=plan.timeout_s,
    )


def _warm_up(plan: ServerPlan, questions: Sequence[Question]) -> None:
    """A few tokens at the highest load. Raises EngineError if no request at all is answered: then nothing else will be."""
    concurrency = min(max(plan.concurrency, default=8), len(questions))
    load = _load(plan, questions[:concurrency], min(plan.max_tokens, _WARM_UP_TOKENS), concurrency=concurrency)
    run = run_load(load, num_processes=plan.num_processes, variant=VARIANT)
    if not run.answered:
        raise EngineError(f"The server answered no request. The first error: {run.requests[0].error}")


def _view(plan: ServerPlan) -> ServerView:
    try:
        text = asyncio.run(fetch(plan.address, "/metrics", api_key=plan.api_key)).decode("utf-8", "replace")
    except StreamError:
        text = ""  # not every server has them
    cpu_s = sum(process_cpu_s(pid) for pid in plan.server_pids) if plan.server_pids else None
    return ServerView(cpu_s=cpu_s, metrics=parse_metrics(text))
