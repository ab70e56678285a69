"""vLLM's names for what we count too, as load generators, gateways and published dashboards read them.

Names, labels and meaning as in vLLM's v1/metrics/loggers.py (0.33). Two differ in detail: a draft's tokens are the depth that its
tree offers, so that acceptance rates compare with those of chains, and inter-token latency is per token, not per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

# behind medusa_ and vllm: alike
_SHARED = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens",
        "generation_tokens",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos",
    }
)
# vLLM numbers its data-parallel engines; here there is one behind each page.
_ENGINE = {"engine": "0"}


def vllm_families(families: Iterable[Metric]) -> Iterator[Metric]:
    """The families under vLLM's names that these, of this server, tell. The others say nothing that vLLM has a name for."""
    for family in families:
        suffix = family.name.removeprefix("medusa_")
        if suffix in _SHARED:
            yield _renamed(family, f"vllm:{suffix}")
        elif suffix == "engine_info":
            yield _cache_config(family)


def _renamed(family: Metric, name: str) -> Metric:
    alias = Metric(name, family.documentation, family.type)
    alias.samples = [
        sample._replace(name=name + sample.name.removeprefix(family.name), labels=sample.labels | _ENGINE)
        for sample in family.samples
    ]
    return alias


def _cache_config(engine_info: Metric) -> Metric:
    labels = ("model_name", "block_size", "num_gpu_blocks", "engine")
    family = GaugeMetricFamily("vllm:cache_config_info", "Size of the KV cache; always 1.", labels=labels)
    for sample in engine_info.samples:
        values = sample.labels | {"num_gpu_blocks": sample.labels["num_blocks"]} | _ENGINE
        family.add_metric([values[label] for label in labels], 1)
    return family
