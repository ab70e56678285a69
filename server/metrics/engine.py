"""What the engine tells of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from medusa_core.outputs import EngineStats


class EngineMetrics:
    """The engine's gauges and counters, labelled with the model's served name. Created once the model is known; `update` before a
    scrape."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name
        self._last_stats = EngineStats()
        self._running = self._gauge("num_requests_running", "Choices that hold a lane.")
        self._waiting = self._gauge("num_requests_waiting", "Choices that wait for a lane.")
        self._cache_usage = self._gauge("kv_cache_usage_perc", "Share of KV cache blocks held by live requests, 0 to 1.")
        self._tree_size = self._gauge("tree_size", "Nodes per lane in the latest decode step, root included (1: plain).")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Choices preempted for lack of KV cache blocks.")

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(f"medusa_{name}", help_text, ("model_name",), registry=self._registry).labels(self._model_name)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(f"medusa_{name}", help_text, ("model_name",), registry=self._registry).labels(self._model_name)

    def update(self, stats: EngineStats) -> None:
        """Take over an engine's snapshot. Its totals start again at 0 when the worker is restarted; the counters do not."""
        last = self._last_stats
        has_restarted = stats.num_steps_total < last.num_steps_total
        if has_restarted:
            last = EngineStats()
        self._preemptions.inc(max(0, stats.num_preemptions_total - last.num_preemptions_total))
        self._prefix_queries.inc(max(0, stats.num_prefix_query_tokens_total - last.num_prefix_query_tokens_total))
        self._prefix_hits.inc(max(0, stats.num_prefix_hit_tokens_total - last.num_prefix_hit_tokens_total))
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._cache_usage.set(stats.kv_cache_usage)
        self._tree_size.set(stats.tree_size)
        self._last_stats = stats
