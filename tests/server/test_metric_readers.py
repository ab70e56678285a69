"""What others read from /metrics: load generators by their own rules, and whoever looks for vLLM's names.

The readers here are written from the rules of `vllm bench serve` (vllm/benchmarks/serve.py) and of AIPerf
(src/aiperf/server_metrics/data_collector.py), as of 2026.
"""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from medusa_core.outputs import EngineStats
from tests.server.fakes import INFO, FakeClient
from tests.server.metric_page import scrape
from tests.server.test_metrics import run_requests

DOCS = Path(__file__).parents[2] / "docs/metrics.md"
STATS = EngineStats(num_running=2, num_waiting=1, num_blocks_used=25, num_blocks=100, num_steps_total=9, num_preemptions_total=4)


async def page_of(http):
    return (await http.get("/metrics")).text


def read_as_vllm_bench(text):
    """Drafts, draft tokens, accepted tokens and accepted per position: summed over all lines that begin so, whatever their labels.

    Which of the four a line counts for is decided by the first of these words that its name contains.
    """
    sums = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens_per_pos": {}, "num_accepted_tokens": 0}
    for line in text.split("\n"):
        if not line.startswith("vllm:spec_decode"):
            continue
        name_and_labels, value = line.split(None, 1)
        name = name_and_labels.split("{")[0]
        if not name.endswith("_total"):
            continue
        word = next(word for word in sums if word in name)
        if isinstance(sums[word], dict):
            position = int(re.search(r'position="(\d+)"', line).group(1))
            sums[word][position] = sums[word].get(position, 0) + int(float(value))
        else:
            sums[word] += int(float(value))
    return sums


async def test_vllm_bench_serve_reads_our_speculation(make_http):
    """It prints what lies between two pages: acceptance length, rate, and the rate at each position."""
    http = await make_http()
    await run_requests(http)
    before = read_as_vllm_bench(await page_of(http))
    await run_requests(http)
    text = await page_of(http)
    after = read_as_vllm_bench(text)
    values = await scrape(http)
    for word, count in after.items():
        own = values[f"medusa_spec_decode_{word}_total"]
        assert (sum(count.values()) if isinstance(count, dict) else count) == own
    drafts = after["num_drafts"] - before["num_drafts"]
    accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    at = {pos: after["num_accepted_tokens_per_pos"][pos] - count for pos, count in before["num_accepted_tokens_per_pos"].items()}
    assert drafts > 0
    assert sum(at.values()) == accepted
    assert list(at) == [0, 1, 2]
    assert 1 < 1 + accepted / drafts <= 1 + len(at)
    assert accepted <= after["num_draft_tokens"] - before["num_draft_tokens"]
    # Older versions count every line that begins so: there is none but the totals.
    assert [line for line in text.splitlines() if re.match(r"vllm:spec_decode\w*(?<!_total)[{ ]", line)] == []


def read_as_aiperf(text):
    """Values by name and labels; of a histogram, its buckets, sum and count. Whatever it would skip with a warning fails here."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert not family.name.endswith("_created")
        for sample in family.samples:
            assert math.isfinite(sample.value), sample
            labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
            if family.type != "histogram":
                assert (family.name, labels) not in found, "of two values with the same labels it keeps the last"
                found[family.name, labels] = sample.value
                continue
            histogram = found.setdefault((family.name, labels), {"buckets": {}})
            if sample.name.endswith("_bucket"):
                histogram["buckets"][sample.labels["le"]] = sample.value
            else:
                histogram[sample.name.rsplit("_", 1)[1]] = sample.value
    return found


def check_histogram(name, histogram):
    counts = list(histogram["buckets"].values())
    assert list(histogram["buckets"])[-1] == "+Inf", name
    assert counts == sorted(counts), name
    assert counts[-1] == histogram["count"], name
    bounds = [float(bound) for bound in histogram["buckets"]]
    assert bounds == sorted(set(bounds)), name


async def test_aiperf_reads_every_family(make_http):
    """It takes what grew between two pages, so nothing may fall and no bucket may come or go."""
    http = await make_http(FakeClient(stats=STATS))
    first = read_as_aiperf(await page_of(http))
    await run_requests(http)
    second = read_as_aiperf(await page_of(http))
    gauges = {family.name for family in text_string_to_metric_families(await page_of(http)) if family.type == "gauge"}
    for (name, labels), value in second.items():
        if isinstance(value, dict):
            check_histogram(name, value)
        earlier = first.get((name, labels))
        if earlier is None:
            # routes that nobody had asked for
            assert name.startswith("medusa_http"), name
        elif isinstance(value, dict):
            assert list(earlier["buckets"]) == list(value["buckets"])
            assert value["count"] >= earlier["count"]
        elif name not in gauges:
            assert value >= earlier, name
    ttft = second["vllm:time_to_first_token_seconds", (("engine", "0"), ("model_name", "tiny"))]
    assert ttft["count"] == 9


# fmt: off
SHARED = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens",
    "request_success", "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos",
]
# fmt: on


async def test_vllms_names_say_what_ours_do(make_http):
    http = await make_http(FakeClient(stats=STATS))
    await run_requests(http)
    families = {family.name: family for family in text_string_to_metric_families(await page_of(http))}
    assert sorted(name for name in families if name.startswith("vllm:")) == sorted(
        [*(f"vllm:{name}" for name in SHARED), "vllm:cache_config_info"]
    )
    for name in SHARED:
        own, alias = families[f"medusa_{name}"], families[f"vllm:{name}"]
        assert (alias.type, alias.documentation) == (own.type, own.documentation)
        for ours, theirs in zip(own.samples, alias.samples, strict=True):
            assert theirs.name.removeprefix("vllm:") == ours.name.removeprefix("medusa_")
            assert theirs.labels == ours.labels | {"engine": "0"}
            assert theirs.value == ours.value
    (config,) = families["vllm:cache_config_info"].samples
    assert config.labels == {"model_name": "tiny", "engine": "0", "block_size": "16", "num_gpu_blocks": "100"}


async def test_the_page_in_the_docs_names_every_metric_and_its_labels(make_http):
    http = await make_http(FakeClient(stats=STATS, description=msgspec.structs.replace(INFO, head_ranks=((1, 0),))))
    await run_requests(http)
    exposed = {}
    for family in text_string_to_metric_families(await page_of(http)):
        if family.name.startswith("medusa_"):
            labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "le"}
            # without a sample yet, such as those of API keys, it does not tell its labels
            exposed[family.name + "_total" * (family.type == "counter")] = labels if family.samples else None
    documented = {}
    for line in DOCS.read_text().splitlines():
        # the first column of a table
        for name, labels in re.findall(r"`(medusa_\w+)(?:\{(.*?)\})?`", line.split(" | ")[0] if line.startswith("| `") else ""):
            documented[name] = set(labels.split(",")) - {""}
    assert set(documented) == set(exposed)
    assert [name for name, labels in exposed.items() if labels not in (None, documented[name])] == []


async def test_a_gateway_finds_the_load_of_an_endpoint(make_http):
    """The gauges that Kubernetes' inference gateway asks for by default, and the size of the cache."""
    values = await scrape(await make_http(FakeClient(stats=STATS)))
    assert values["vllm:num_requests_waiting"] == 1
    assert values["vllm:num_requests_running"] == 2
    assert values["vllm:kv_cache_usage_perc"] == 0.25
    assert values["vllm:cache_config_info", "block_size", str(INFO.block_size)] == 1


async def test_vllms_names_can_be_left_out(make_http):
    http = await make_http(no_vllm_metrics=True)
    await run_requests(http)
    text = await page_of(http)
    assert "vllm:" not in text
    assert "medusa_generation_tokens_total" in text


@pytest.mark.parametrize("name", ["medusa_build_info", "medusa_requests_refused", "medusa_http_requests"])
async def test_what_needs_no_model_is_there_while_it_loads(make_http, name):
    text = await page_of(await make_http(FakeClient(loading=asyncio.Event())))
    assert f"# TYPE {name}" in text
    assert "vllm:" not in text
