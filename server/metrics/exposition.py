"""The page that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.metrics.vllm_names import vllm_families


def render(*families: Iterable[Metric], has_vllm_names: bool = False) -> bytes:
    """All families, in order, in Prometheus' text format. Times of creation are left out.

    has_vllm_names: tell what vLLM has a name for under that name as well.
    """
    own = [_without_creation(family) for family in chain(*families)]
    return generate_latest(_Families([*own, *vllm_families(own)] if has_vllm_names else own))


def _without_creation(family: Metric) -> Metric:
    # In the text format each would be one more series, which nobody reads.
    family.samples = [sample for sample in family.samples if sample.name != f"{family.name}_created"]
    return family


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
