"""Prometheus metrics, in a registry of their own per app.

Token counts are taken after trimming at stop strings, so that generation tokens equal the sum of `usage.completion_tokens`.
Speculation counts follow the vocabulary of the engine: the first token of a choice belongs to no step, a step without draft nodes
is a plain step, and acceptance length is the number of tokens kept of a step that had draft nodes, bonus included.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from medusa_core.outputs import EngineStats, TokenDelta

# fmt: off
TTFT_BUCKETS = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
# A speculating model emits a token every few milliseconds, so the scale starts well below them.
ITL_BUCKETS = (
    .0005, .001, .002, .004, .006, .008, .01, .015, .02, .025, .03, .04, .05, .075, .1, .15, .2, .3, .5, .75, 1, 2.5, 5, 10,
)
LATENCY_BUCKETS = (
    .01, .05, .1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
# fmt: on
RATE_WINDOW_S = 10.0


class HttpMetrics:
    """Requests and durations per route. Exists before the model is loaded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route", "status")
        self._requests = Counter("medusa_http_requests", "HTTP requests answered.", labels, registry=registry)
        self._duration = Histogram(
            "medusa_http_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("method", "route"),
            registry=registry,
            buckets=LATENCY_BUCKETS,
        )

    def observe(self, *, method: str, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._duration.labels(method, route).observe(duration_s)


class TokenRate:
    """Tokens per second over the last ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # (second, tokens emitted in it), oldest first; one second more than the window, which need not begin with one
        self._seconds: deque[tuple[int, int]] = deque(maxlen=int(RATE_WINDOW_S) + 1)

    def add(self, num_tokens: int) -> None:
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            num_tokens += self._seconds.pop()[1]
        self._seconds.append((second, num_tokens))

    def per_second(self) -> float:
        self._drop_old()
        return sum(count for _, count in self._seconds) / RATE_WINDOW_S

    def _drop_old(self) -> None:
        oldest = self._clock() - RATE_WINDOW_S
        while self._seconds and self._seconds[0][0] < oldest:
            self._seconds.popleft()


class TokenHistogram(Collector):
    """A histogram of what happens for every token. One of the library's costs a lock or two and ten times as much to observe.

    empty: one of the library's, not registered, with the same `buckets` and nothing observed. Names and labels are taken from it.
    """

    def __init__(self, empty: Histogram, buckets: tuple[float, ...], registry: CollectorRegistry) -> None:
        self._empty = empty
        self._buckets = buckets
        # one more: above the last bound
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, *, times: int = 1) -> None:
        # A bound belongs to the bucket below it.
        self._counts[bisect_left(self._buckets, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """The library's samples, in its order, with our counts."""
        for family in self._empty.collect():
            up_to_bound = accumulate(self._counts)
            values = {"_count": sum(self._counts), "_sum": self._sum}
            for idx, sample in enumerate(family.samples):
                suffix = sample.name.removeprefix(family.name)
                if suffix == "_bucket":
                    family.samples[idx] = sample._replace(value=next(up_to_bound))
                elif suffix in values:
                    family.samples[idx] = sample._replace(value=values[suffix])
            yield family


class EngineMetrics:
    """What requests and the engine do, labelled with the model's served name. Created once the model is known.

    `update` brings it up to date before a scrape: counts of each step are plain additions until then, as a Prometheus counter costs
    a lock and ten times as much.
    """

    def __init__(self, registry: CollectorRegistry, *, model_name: str, max_depth: int) -> None:
        self._registry = registry
        self._model_name = model_name
        self.token_rate = TokenRate()
        self._last_stats = EngineStats()
        self._counts: defaultdict[Counter, int] = defaultdict(int)
        self._create_request_metrics()
        self._create_speculation_metrics(max_depth)
        self._create_engine_metrics()

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(f"medusa_{name}", help_text, ("model_name",), registry=self._registry).labels(self._model_name)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(f"medusa_{name}", help_text, ("model_name",), registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"medusa_{name}", help_text, ("model_name",), registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)

    def _token_histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> TokenHistogram:
        empty = Histogram(f"medusa_{name}", help_text, ("model_name",), registry=None, buckets=buckets)
        empty.labels(self._model_name)
        return TokenHistogram(empty, buckets, self._registry)

    def _create_request_metrics(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got a first token.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens emitted, after trimming at stop strings.")
        self._discarded_tokens = self._counter("discarded_tokens", "Tokens the engine emitted past a stop string.")
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token, per choice.", TTFT_BUCKETS)
        self._itl = self._token_histogram(
            "inter_token_latency_seconds",
            "Time between arrivals of tokens over the tokens that arrived together, observed once per token.",
            ITL_BUCKETS,
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token, per choice.", LATENCY_BUCKETS)
        self._queue_time = self._histogram("request_queue_time_seconds", "Wait for a lane, per choice.", LATENCY_BUCKETS)
        self._finished = Counter(
            "medusa_request_success",
            "Choices that ended, by reason: stop, length, abort (client gone), error.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(self._model_name, reason)

    def _create_speculation_metrics(self, max_depth: int) -> None:
        self._acceptance_length = self._token_histogram(
            "acceptance_length",
            "Tokens kept of a verification step with draft nodes, bonus included.",
            tuple(float(length) for length in range(1, max_depth + 2)),
        )
        self._drafts = self._counter("spec_decode_num_drafts", "Verification steps with draft nodes, per choice.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Depth offered: longest path of each draft.")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Draft tokens accepted, after trimming.")
        self._tree_nodes = self._counter("spec_decode_num_tree_nodes", "Tree nodes offered, root excluded.")
        self._plain_steps = self._counter("plain_steps", "Decode steps without draft nodes, per choice.")
        per_position = Counter(
            "medusa_spec_decode_num_accepted_tokens_per_pos",
            "Drafts whose accepted length exceeds the position.",
            ("model_name", "position"),
            registry=self._registry,
        )
        self._accepted_at = [per_position.labels(self._model_name, str(position)) for position in range(max_depth)]

    def _create_engine_metrics(self) -> None:
        self._running = self._gauge("num_requests_running", "Choices that hold a lane.")
        self._waiting = self._gauge("num_requests_waiting", "Choices that wait for a lane.")
        self._cache_usage = self._gauge("kv_cache_usage_perc", "Share of KV cache blocks held by live requests, 0 to 1.")
        self._tree_size = self._gauge("tree_size", "Nodes per lane in the latest decode step, root included (1: plain).")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Choices preempted for lack of KV cache blocks.")
        tokens_per_second = self._gauge("tokens_per_second", "Tokens emitted per second over the last ten seconds.")
        tokens_per_second.set_function(self.token_rate.per_second)

    def observe_prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def observe_first_delta(self, *, ttft_s: float, queue_s: float) -> None:
        self._ttft.observe(ttft_s)
        self._queue_time.observe(queue_s)

    def observe_delta(self, delta: TokenDelta, *, num_kept: int) -> None:
        """Count one delta of one choice, of which `num_kept` tokens survived trimming."""
        if num_kept < len(delta.token_ids):
            self.observe_discarded(len(delta.token_ids) - num_kept)
        if num_kept == 0:
            return
        self._counts[self._generation_tokens] += num_kept
        self.token_rate.add(num_kept)
        if delta.num_draft_nodes > 0:
            self._observe_draft(delta, num_kept)
        elif not delta.is_first:
            self._counts[self._plain_steps] += 1

    def observe_interval(self, interval_s: float, *, num_tokens: int) -> None:
        """`num_tokens` kept tokens of a choice arrived together, `interval_s` after those before them."""
        if num_tokens:
            self._itl.observe(interval_s / num_tokens, times=num_tokens)

    def _observe_draft(self, delta: TokenDelta, num_kept: int) -> None:
        num_accepted = min(delta.num_accepted, num_kept)
        counts = self._counts
        counts[self._drafts] += 1
        counts[self._draft_tokens] += delta.draft_depth
        counts[self._tree_nodes] += delta.num_draft_nodes
        counts[self._accepted_tokens] += num_accepted
        for counter in self._accepted_at[:num_accepted]:
            counts[counter] += 1
        self._acceptance_length.observe(num_kept)

    def observe_discarded(self, num_tokens: int) -> None:
        self._counts[self._discarded_tokens] += num_tokens

    def observe_finish(self, reason: str, *, e2e_s: float) -> None:
        self._finished.labels(self._model_name, reason).inc()
        if reason in ("stop", "length"):
            self._e2e.observe(e2e_s)

    def update(self, stats: EngineStats) -> None:
        """Bring the counters up to date, and take over an engine's snapshot.

        The snapshot's totals start again at 0 when the worker is restarted; the counters do not.
        """
        for counter, count in self._counts.items():
            counter.inc(count)
        self._counts.clear()
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
