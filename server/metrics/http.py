"""HTTP requests of one front end."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.metrics import buckets


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
            buckets=buckets.LATENCY,
        )

    def observe(self, *, method: str, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._duration.labels(method, route).observe(duration_s)
