"""The page that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


def render(*families: Iterable[Metric]) -> bytes:
    """All families, in order, in Prometheus' text format. Times of creation are left out."""
    return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: tuple[Iterable[Metric], ...]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for families in self._families:
            for family in families:
                # In the text format each would be one more series, which nobody reads.
                family.samples = [sample for sample in family.samples if sample.name != f"{family.name}_created"]
                yield family
