"""HTTP requests of one front end."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.errors import refusal_codes
from server.metrics import buckets


class HttpMetrics:
    """Requests and durations per route, and refusals. Exists before the model is loaded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route", "status")
        self._requests = Counter("medusa_http_requests", "HTTP requests answered.", labels, registry=registry)
        self._duration = Histogram(
            "medusa_http_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("method", "route"),
            registry=registry,
            buckets=buckets.LATENCY,
        )
        self._refused = Counter(
            "medusa_requests_refused",
            "Requests answered with an error that is not the server's failure, by the error's code.",
            ("reason",),
            registry=registry,
        )
        self._key_requests = Counter(
            "medusa_key_requests", "Requests answered, by the name of their API key.", ("key", "status"), registry=registry
        )
        self._key_tokens = Counter(
            "medusa_key_tokens",
            "Tokens of prompts and completions, by the name of the API key they are charged to.",
            ("key",),
            registry=registry,
        )
        # There from the start, so that the first refusal is an increase too.
        for code in refusal_codes():
            self._refused.labels(code)

    def observe(self, *, method: str, route: str, status: int, duration_s: float, refusal: str | None = None) -> None:
        """Count one answer. refusal: the code of the error it tells, where that is one of `refusal_codes`."""
        self._requests.labels(method, route, str(status)).inc()
        self._duration.labels(method, route).observe(duration_s)
        if refusal is not None:
            self._refused.labels(refusal).inc()

    def observe_key(self, name: str, *, status: int, num_tokens: int) -> None:
        """Count an answer for the one whose key asked for it. Names are the operator's, so there are only so many."""
        self._key_requests.labels(name, str(status)).inc()
        self._key_tokens.labels(name).inc(num_tokens)
