"""What the engine tells of itself."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from itertools import accumulate, zip_longest

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from medusa_core import __version__
from medusa_core.outputs import STEP_LATENCY_BOUNDS_S, EngineInfo, EngineStats
from server.metrics.collectors import histogram_family

Totals = list[float]

_GAUGES = (
    ("num_requests_running", "num_running", "Choices that hold a lane."),
    ("num_requests_waiting", "num_waiting", "Choices that wait for a lane."),
    ("kv_cache_usage_perc", "kv_cache_usage", "Share of KV cache blocks held by live requests, 0 to 1."),
    ("tree_size", "tree_size", "Nodes per lane in the latest decode step, root included (1: plain)."),
)
_COUNTERS = (
    ("prefix_cache_queries", "num_prefix_query_tokens_total", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "num_prefix_hit_tokens_total", "Prompt tokens found in the prefix cache."),
    ("num_preemptions", "num_preemptions_total", "Choices preempted for lack of KV cache blocks."),
    ("engine_steps", "num_steps_total", "Steps that computed anything, prompts or output."),
    (
        "decode_step_cost_seconds",
        "decode_cost_seconds_total",
        "Time of the decode part of all steps, by the costs measured at start.",
    ),
    ("draft_cost_seconds", "draft_cost_seconds_total", "Part of medusa_decode_step_cost_seconds_total that is drafting."),
    (
        "plain_decode_cost_seconds",
        "plain_cost_seconds_total",
        "Time that plain decoding would have taken for the same tokens, by the same costs.",
    ),
)
_TOTALS = tuple(name for name in EngineStats.__struct_fields__ if name.endswith("_total"))


def register_build_info(registry: CollectorRegistry) -> None:
    """Which versions run. Known before the model is."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    values = {"version": __version__, "python": platform.python_version(), **libraries}
    Gauge("medusa_build_info", "Versions of what runs; always 1.", tuple(values), registry=registry).labels(**values).set(1)


class EngineMetrics(Collector):
    """The engine's gauges and counters, labelled with the model's served name. Created once the model is known; `update` before a
    scrape. num_front_ends: how many there should be before it."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str, info: EngineInfo, num_front_ends: int = 1) -> None:
        self._labels = {"model_name": model_name}
        self._num_front_ends = num_front_ends
        self._info = info
        self._stats = EngineStats(num_blocks=info.num_blocks)
        self._is_up = False
        # How often the engine had been started when the totals were last taken; what had been counted before that start; and now.
        self._num_starts = 0
        self._earlier = {name: list[float]() for name in _TOTALS}
        self._totals = {name: list[float]() for name in _TOTALS}
        registry.register(self)

    def update(self, stats: EngineStats | None) -> None:
        """Take over a snapshot; None of an engine that is dead, which runs nothing, whatever its last one said.

        A snapshot's totals start again at 0 when the worker is restarted; the counters do not, nor do they fall when snapshots come
        out of order.
        """
        self._is_up = stats is not None
        stats = self._stats = EngineStats() if stats is None else stats
        if stats.num_starts > self._num_starts:
            self._num_starts = stats.num_starts
            self._earlier = self._totals
        if stats.num_starts == self._num_starts:
            self._totals = {
                name: [
                    max(total, value) for total, value in zip_longest(self._totals[name], _sums(earlier, stats, name), fillvalue=0)
                ]
                for name, earlier in self._earlier.items()
            }

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("engine_up", "1 while the engine takes requests, 0 while it is down.", self._is_up)
        yield self._gauge("front_ends_wanted", "HTTP processes that there should be.", self._num_front_ends)
        for name, attribute, text in _GAUGES:
            yield self._gauge(name, text, getattr(self._stats, attribute))
        yield self._gauge("kv_cache_blocks", "KV cache blocks there are.", self._info.num_blocks)
        for name, total, text in _COUNTERS:
            yield self._counter(name, text, [({}, self._total(total)[0])])
        restarts = max(self._num_starts - 1, 0)
        yield self._counter("worker_restarts", "Starts of the engine's process after the first.", [({}, restarts)])
        yield self._step_latency()
        yield from self._speculation()
        yield self._engine_info()

    def _speculation(self) -> Iterator[Metric]:
        sizes, ranks = self._info.tree_sizes, self._info.head_ranks
        by_size = zip(sizes, self._total("num_steps_by_size_total", len(sizes)), strict=False)
        yield self._counter(
            "decode_steps_by_tree_size",
            "Steps with decode rows, by nodes of the largest tree in them, root included.",
            [({"nodes": str(size)}, count) for size, count in by_size],
        )
        hits = self._total("num_head_hits_total", len(ranks))
        sources = {"head": sum(hits), "lookup": self._total("num_lookup_hits_total")[0]}
        yield self._counter(
            "spec_decode_accepted_by_source",
            "Draft tokens accepted, before trimming, by who offered them: a head, or prompt lookup alone.",
            [({"source": source}, count) for source, count in sources.items()],
        )
        yield self._counter(
            "spec_decode_head_hits",
            "Draft tokens accepted, before trimming, that were this head's candidate of this rank (1: its best).",
            [({"head": str(head), "rank": str(rank + 1)}, count) for (head, rank), count in zip(ranks, hits, strict=False)],
        )

    def _step_latency(self) -> Metric:
        counts = self._total("num_steps_by_latency_total", len(STEP_LATENCY_BOUNDS_S) + 1)
        return histogram_family(
            "medusa_step_latency_seconds",
            "Time of each step from its launch, or from the result before it where that was later, to its own result.",
            self._labels,
            bounds=STEP_LATENCY_BOUNDS_S,
            counts=accumulate(counts),
            total=self._total("step_seconds_total")[0],
        )

    def _engine_info(self) -> Metric:
        info = self._info
        values: dict[str, object] = {
            "model": info.model_name,
            "dtype": info.dtype,
            "device": info.device,
            "heads": info.num_heads,
            "tree": info.tree,
            "max_model_len": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
            "block_size": info.block_size,
            "num_blocks": info.num_blocks,
        }
        labels = self._labels | {name: str(value) for name, value in values.items()}
        family = GaugeMetricFamily("medusa_engine_info", "What the engine serves, and how; always 1.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _total(self, name: str, length: int = 1) -> Totals:
        """As many as there are labels for, zeros before the first snapshot."""
        totals = self._totals[name]
        return totals + [0.0] * (length - len(totals))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"medusa_{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, counts: list[tuple[dict[str, str], float]]) -> Metric:
        family = CounterMetricFamily(f"medusa_{name}", text, labels=[*self._labels, *(counts[0][0] if counts else ())])
        for labels, count in counts:
            family.add_metric([*self._labels.values(), *labels.values()], count)
        return family


def _sums(earlier: Totals, stats: EngineStats, name: str) -> Totals:
    value = getattr(stats, name)
    values = value if isinstance(value, tuple) else (value,)
    return [sum(pair) for pair in zip_longest(earlier, values, fillvalue=0)]
