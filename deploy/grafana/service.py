"""The dashboard "Medusa: service": what clients get, and how full the servers are."""

from __future__ import annotations

from collections.abc import Sequence

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel

from deploy.grafana.panels import bars, distribution, facts, page, series, stats
from deploy.grafana.promql import API, ENGINE, SERVER, gauge, increase, quantile, rate, ratio

TOKENS_PER_S = "suffix: tok/s"
QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
SERVER_ERRORS = f'{API},status=~"5.."'


def service() -> Dashboard:
    """The dashboard."""
    return page(
        "medusa-service",
        "Medusa: service",
        description="Requests, latencies, tokens, queue and KV cache of medusa-server.",
        top=_top(),
        rows=[
            ("Requests", _requests()),
            ("Latency", _latency()),
            ("Tokens", _tokens()),
            ("Scheduler and KV cache", _scheduler()),
            ("Engine", _engine()),
            ("API keys", _keys()),
        ],
    )


def _quantiles(name: str) -> list[tuple[str, str]]:
    return [(quantile(share, name), legend) for share, legend in QUANTILES]


def _error_share() -> str:
    """0 instead of nothing while there has never been an error."""
    return ratio(f"({rate('http_requests_total', of=SERVER_ERRORS)} or vector(0))", rate("http_requests_total", of=API))


def _top() -> Sequence[Builder[Panel]]:
    return [
        stats("Requests", rate("http_requests_total", of=API), unit="reqps", description="Requests to /v1 that ended, per second."),
        stats("Output", rate("generation_tokens_total"), unit=TOKENS_PER_S, description="Tokens that clients got.", decimals=1),
        stats(
            "First token, p95",
            quantile(0.95, "time_to_first_token_seconds"),
            unit="s",
            description="Arrival to first token, of choices.",
            steps=[(1, "yellow"), (2.5, "red")],
        ),
        stats(
            "Next token, p95",
            quantile(0.95, "inter_token_latency_seconds"),
            unit="s",
            description="Time between arrivals of tokens over the tokens that arrived together.",
        ),
        stats(
            "Server errors",
            _error_share(),
            unit="percentunit",
            decimals=2,
            description="Share of the requests to /v1 that were answered with a 5xx. Refusals for overload (503) count.",
            steps=[(0.001, "yellow"), (0.01, "red")],
        ),
        stats(
            "Waiting",
            gauge("num_requests_waiting"),
            unit="short",
            description="Choices that wait for a lane.",
            steps=[(1, "yellow")],
        ),
        stats(
            "KV cache in use",
            gauge("kv_cache_usage_perc", function="max"),
            unit="percentunit",
            decimals=0,
            description="Held by live requests, of the fullest server.",
            steps=[(0.8, "yellow"), (0.95, "red")],
        ),
        stats("Engines", gauge("engine_up"), unit="short", description="Servers whose engine takes requests."),
    ]


def _requests() -> Sequence[Builder[Panel]]:
    return [
        series(
            "Answers by status",
            [(rate("http_requests_total", of=API, by="status"), "{{status}}")],
            unit="reqps",
            width=6,
            description="Of /v1. A stream that breaks off has the status 200. 499: the client left before the answer began.",
            is_stacked=True,
        ),
        series(
            "Answers by route",
            [(rate("http_requests_total", of=SERVER, by="route"), "{{route}}")],
            unit="reqps",
            width=6,
            description="All routes, probes and scrapes included.",
        ),
        series(
            "Refused by reason",
            [(rate("requests_refused_total", of=SERVER, by="reason"), "{{reason}}")],
            unit="reqps",
            width=6,
            description="Requests answered with an error, by its code.",
            is_stacked=True,
        ),
        series(
            "Choices ended by reason",
            [(rate("request_success_total", by="finished_reason"), "{{finished_reason}}")],
            unit="reqps",
            width=6,
            description="stop and length are answers; abort: the client left; error: broken off.",
            is_stacked=True,
        ),
        series(
            "Server errors",
            [(_error_share(), "5xx of /v1")],
            unit="percentunit",
            width=8,
            description="Share of the requests to /v1. The alert MedusaServerErrors watches it.",
        ),
        series(
            "Duration by route, p95",
            [(quantile(0.95, "http_request_duration_seconds", of=API, by="route"), "{{route}}")],
            unit="s",
            width=8,
            description="Arrival of a request to the end of its answer, streams to their end.",
        ),
        series(
            "Front ends",
            [
                (gauge("front_ends", by="instance"), "{{instance}}"),
                (gauge("front_ends_wanted", by="instance"), "{{instance}} wanted"),
            ],
            unit="short",
            width=8,
            description="HTTP processes that answer. Fewer than wanted: one has died, and its log says why it is not back.",
        ),
    ]


def _latency() -> Sequence[Builder[Panel]]:
    panels = (
        ("Time to first token", "time_to_first_token_seconds", "Arrival to first token, of choices."),
        (
            "Inter-token latency",
            "inter_token_latency_seconds",
            "Time between arrivals over the tokens that arrived together; once per token.",
        ),
        (
            "Time per output token",
            "request_time_per_output_token_seconds",
            "First to last token over the tokens after the first, of choices.",
        ),
        ("End to end", "e2e_request_latency_seconds", "Arrival to last token, of choices that ended by themselves."),
        ("Queue", "request_queue_time_seconds", "Wait for a lane."),
        ("Prefill", "request_prefill_time_seconds", "A lane to the first token: the prompt's computation."),
        ("Decode", "request_decode_time_seconds", "First token to last."),
    )
    lines = [series(title, _quantiles(name), unit="s", width=6, description=text) for title, name, text in panels]
    heatmap = distribution(
        "Time to first token, all",
        rate("time_to_first_token_seconds_bucket", by="le"),
        unit="s",
        width=6,
        description="Choices per second by time to first token.",
    )
    return [*lines, heatmap]


def _tokens() -> Sequence[Builder[Panel]]:
    return [
        series(
            "Tokens",
            [
                (rate("prompt_tokens_total"), "prompt"),
                (rate("prompt_tokens_cached_total"), "prompt, from the prefix cache"),
                (rate("generation_tokens_total"), "output"),
                (rate("discarded_tokens_total"), "computed past a stop string, discarded"),
            ],
            unit=TOKENS_PER_S,
            width=6,
            description="Output is what clients get, after trimming at stop strings: the sum of usage.completion_tokens.",
        ),
        series(
            "Output by server",
            [(gauge("tokens_per_second", by="instance"), "{{instance}}")],
            unit=TOKENS_PER_S,
            width=6,
            description="As each server measures it, over ten seconds.",
            is_stacked=True,
        ),
        bars(
            "Prompt lengths",
            increase("request_prompt_tokens_bucket", by="le"),
            legend="{{le}}",
            unit="short",
            width=6,
            description="Prompts by tokens, up to the length named.",
            is_histogram=True,
        ),
        bars(
            "Answer lengths",
            increase("request_generation_tokens_bucket", by="le"),
            legend="{{le}}",
            unit="short",
            width=6,
            description="Choices by tokens, up to the length named.",
            is_histogram=True,
        ),
    ]


def _scheduler() -> Sequence[Builder[Panel]]:
    return [
        series(
            "Choices",
            [
                (gauge("num_requests_running"), "running"),
                (gauge("num_requests_waiting"), "waiting"),
                (gauge("open_requests"), "open requests"),
            ],
            unit="short",
            width=6,
            description="A choice is one of a request's n answers, and runs while it has a lane. Requests are open till they end.",
        ),
        series(
            "KV cache in use",
            [(gauge("kv_cache_usage_perc", function="max", by="instance"), "{{instance}}")],
            unit="percentunit",
            width=6,
            description="Share of the blocks that live requests hold. What only the prefix cache holds is free.",
            is_share=True,
        ),
        series(
            "KV cache blocks",
            [
                (f"sum({gauge('kv_cache_usage_perc', by='instance')} * {gauge('kv_cache_blocks', by='instance')})", "held"),
                (gauge("kv_cache_blocks"), "all"),
            ],
            unit="short",
            width=6,
            description="In blocks of --block-size tokens, over all servers.",
        ),
        series(
            "Prefix cache hits",
            [(ratio(rate("prefix_cache_hits_total"), rate("prefix_cache_queries_total")), "of prompt tokens")],
            unit="percentunit",
            width=6,
            description="Share of prompt tokens whose keys and values were there already.",
            is_share=True,
        ),
        series(
            "Preemptions",
            [(rate("num_preemptions_total", by="instance"), "{{instance}}")],
            unit="ops",
            width=8,
            description="Choices that lost their lane for lack of KV cache and are computed again.",
        ),
        series(
            "Engine steps",
            [(rate("engine_steps_total", by="instance"), "{{instance}}")],
            unit="ops",
            width=8,
            description="0 while choices run means that the engine hangs.",
        ),
        series(
            "Step latency",
            _quantiles("step_latency_seconds"),
            unit="s",
            width=8,
            description="Of one engine step for all running choices, prompt chunks included.",
        ),
    ]


def _keys() -> Sequence[Builder[Panel]]:
    return [
        series(
            "Requests by key",
            [(rate("key_requests_total", of=SERVER, by="key"), "{{key}}")],
            unit="reqps",
            width=8,
            description="By the key's name. Empty where the server asks for no key.",
            is_stacked=True,
        ),
        series(
            "Tokens by key",
            [(rate("key_tokens_total", of=SERVER, by="key"), "{{key}}")],
            unit=TOKENS_PER_S,
            width=8,
            description="Of prompts and answers, as they count against the key's limit.",
            is_stacked=True,
        ),
        series(
            "Answers to keys by status",
            [(rate("key_requests_total", of=SERVER, by="key, status"), "{{key}} {{status}}")],
            unit="reqps",
            width=8,
            description="429: the key is over its limit.",
            is_stacked=True,
        ),
    ]


def _engine() -> Sequence[Builder[Panel]]:
    scrape = ("job", "endpoint", "namespace", "pod", "service", "container")
    return [
        series(
            "Worker restarts",
            [(increase("worker_restarts_total", by="instance", window="$__rate_interval"), "{{instance}}")],
            unit="short",
            width=6,
            description="Each one lost the requests that the engine ran.",
        ),
        facts(
            "Models",
            f"medusa_engine_info{{{ENGINE}}}",
            hidden=scrape,
            width=18,
            height=8,
            description="What each server has loaded.",
        ),
        facts(
            "Versions",
            f"medusa_build_info{{{SERVER}}}",
            hidden=scrape,
            width=24,
            height=5,
            description="What each server is made of.",
        ),
    ]
