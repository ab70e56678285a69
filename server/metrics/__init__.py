"""Prometheus metrics, in registries of their own per app.

There are two registries, since several front ends may stand before one engine. What a front end counts itself is in the first
(`HttpMetrics`, `GenerationMetrics`): summed over front ends it is the truth. What the engine tells is in the second
(`EngineMetrics`): every front end knows the same, and one of them says it.

Token counts are taken after trimming at stop strings, so that generation tokens equal the sum of `usage.completion_tokens`.
Speculation counts follow the vocabulary of the engine: the first token of a choice belongs to no step, a step without draft nodes
is a plain step, and acceptance length is the number of tokens kept of a step that had draft nodes, bonus included.
"""

from server.metrics.engine import EngineMetrics, register_build_info
from server.metrics.exposition import render
from server.metrics.generation import GenerationMetrics
from server.metrics.http import HttpMetrics

__all__ = ["EngineMetrics", "GenerationMetrics", "HttpMetrics", "register_build_info", "render"]
