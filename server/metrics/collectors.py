"""Counters and histograms of what happens for every token, as plain additions.

Those of the library take a lock or two and ten times as long, and all streams of a front end share one thread.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

RATE_WINDOW_S = 10.0


class Count:
    """One value of a TokenCounter, to add to."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class TokenCounter(Collector):
    """A counter whose `labels` are plain variables. Not thread-safe."""

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._counts: dict[tuple[str, ...], Count] = {}
        registry.register(self)

    def labels(self, *values: str) -> Count:
        """The count of these label values, shown from now on."""
        return self._counts.setdefault(values, Count())

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, count in self._counts.items():
            family.add_metric(values, count.value)
        yield family


class TokenHistogram(Collector):
    """A histogram without locks. Not thread-safe.

    bounds: upper ends of the buckets, increasing, each of which belongs to its bucket. labels: names and values.
    """

    def __init__(
        self, name: str, documentation: str, labels: dict[str, str], registry: CollectorRegistry, *, bounds: tuple[float, ...]
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._bounds = bounds
        # one more: above the last bound
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, *, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        counts = accumulate(self._counts)
        yield histogram_family(self._name, self._documentation, self._labels, bounds=self._bounds, counts=counts, total=self._sum)


def histogram_family(
    name: str, documentation: str, labels: dict[str, str], *, bounds: tuple[float, ...], counts: Iterable[float], total: float
) -> Metric:
    """counts: of what is at most each bound, and of all. total: the sum of what was observed."""
    family = HistogramMetricFamily(name, documentation, labels=list(labels))
    names = map(floatToGoString, (*bounds, INF))
    family.add_metric(list(labels.values()), list(zip(names, counts, strict=True)), total)
    return family


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
