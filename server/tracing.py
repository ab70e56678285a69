"""Traces of requests, in OpenTelemetry's conventions for generative AI. The SDK (extra `otel`) is imported when traces are wanted.

A span is written when its request has ended, from what was collected on the way, with the times at which things happened: nothing
is done per token, and a request that is not sampled costs the decision alone. Sampling, headers and resource attributes are set as
everywhere by variables of the SDK: OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from medusa_core import __version__
from medusa_core.errors import ConfigError
from server.generation import Generation
from server.protocol.chat import ChatBody
from server.protocol.common import GenerationBody
from server.request_info import RequestInfo

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

# Requests that are traced, and what the conventions call them.
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat", "/v1/responses": "chat"}
# Of the body, where they are given. Not the stop strings, which are the client's text.
_REQUEST_ATTRIBUTES = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")
# How long the last spans may take to leave at the end, and one attempt to send some.
_CLOSE_TIMEOUT_S = 2.0
_EXPORT_TIMEOUT_S = 5.0


def otlp_tracer(endpoint: str) -> RequestTracer:
    """Sends spans over OTLP (HTTP, protobuf) to the URL, from a thread, in batches. While the collector cannot be reached they are
    dropped. Raises ConfigError."""
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp-traces-endpoint must be a URL such as http://collector:4318/v1/traces, got {endpoint!r}.")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        hint = 'Install them: pip install ".[otel]" in a checkout of medusa-server.'
        raise ConfigError(f"--otlp-traces-endpoint needs OpenTelemetry's packages ({error}).", hint=hint) from error
    resource = Resource({"service.name": "medusa-server", "service.version": __version__}).merge(OTELResourceDetector().detect())
    # Not its own handler at exit, which would wait for a collector that is gone.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)))
    return RequestTracer(provider)


class RequestTracer:
    """Writes one span per generation request, with children for its time in the queue, before the first token, and after it."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("medusa-server", __version__)
        self._extract = TraceContextTextMapPropagator().extract
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def record(self, scope: MutableMapping[str, Any], info: RequestInfo, *, route: str, status: int, duration_s: float) -> None:
        """The span of a request that ends now, in the caller's trace if it sent one. Sets `info.trace_id`."""
        operation = _OPERATIONS.get(route)
        if operation is None or scope["method"] != "POST":
            return
        clock = _Clock(info.arrival_s + duration_s)
        span = self._tracer.start_span(
            operation if info.body is None else f"{operation} {info.body.model}",
            context=self._extract(Headers(scope=scope)),
            kind=self._kind,
            start_time=clock.at(info.arrival_s),
        )
        info.trace_id = f"{span.get_span_context().trace_id:032x}"
        if span.is_recording():
            self._describe(span, info, operation, {"http.request.method": scope["method"], "http.route": route}, status)
            if info.generation is not None:
                self._add_phases(span, info.generation, info.arrival_s, clock)
        span.end(clock.at(info.arrival_s + duration_s))

    async def close(self) -> None:
        """Send what is left, within bounds."""
        thread = threading.Thread(target=self._provider.shutdown, name="close-tracer", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, _CLOSE_TIMEOUT_S)

    def _describe(self, span: Span, info: RequestInfo, operation: str, http: dict[str, Any], status: int) -> None:
        attributes: dict[str, Any] = {
            **http,
            "http.response.status_code": status,
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "medusa",
            "gen_ai.response.id": info.reply_id,
            "medusa.request_id": info.request_id,
            "medusa.api_key_name": info.key_name,
        }
        error_code = info.error_code
        if info.generation is not None and info.body is not None:
            attributes |= _of_body(info.body) | _of_generation(info.generation, info.arrival_s)
            error_code = error_code or info.generation.error_code
        attributes["error.type"] = error_code
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        # By the conventions for HTTP a client's mistake is no error of the server.
        if error_code is not None and not 400 <= status < 500:
            span.set_status(self._failed)

    def _add_phases(self, parent: Span, generation: Generation, arrival_s: float, clock: _Clock) -> None:
        from opentelemetry.trace import set_span_in_context

        work = generation.work
        if work.first_s is None or work.last_s is None or work.queue_s is None:
            return
        context = set_span_in_context(parent)
        scheduled_s = arrival_s + work.queue_s
        for name, start_s, end_s in (
            ("queue", arrival_s, scheduled_s),
            ("prefill", scheduled_s, work.first_s),
            ("decode", work.first_s, work.last_s),
        ):
            self._tracer.start_span(name, context=context, start_time=clock.at(start_s)).end(clock.at(end_s))


class _Clock:
    """Times of `time.monotonic()` as nanoseconds since 1970, given that it is `now_s` now."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self._now_ns = time.time_ns()

    def at(self, monotonic_s: float) -> int:
        return self._now_ns - round((self._now_s - monotonic_s) * 1e9)


def _of_body(body: GenerationBody) -> dict[str, Any]:
    attributes = {f"gen_ai.request.{name}": getattr(body, name) for name in _REQUEST_ATTRIBUTES}
    limit = (body.max_completion_tokens or body.max_tokens) if isinstance(body, ChatBody) else body.max_tokens
    return attributes | {
        "gen_ai.request.model": body.model,
        "gen_ai.response.model": body.model,
        "gen_ai.request.max_tokens": limit,
        "gen_ai.request.choice.count": body.n if body.n != 1 else None,
        "gen_ai.request.stream": bool(body.stream),
    }


def _of_generation(generation: Generation, arrival_s: float) -> dict[str, Any]:
    usage, work = generation.usage, generation.work
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.prompt_tokens_details.cached_tokens,
        "gen_ai.response.finish_reasons": [reason for reason in generation.finish_reasons if reason is not None],
        "gen_ai.response.time_to_first_chunk": None if work.first_s is None else work.first_s - arrival_s,
        "medusa.queue_time_s": work.queue_s,
        "medusa.num_drafts": work.num_drafts,
        "medusa.num_draft_tokens": work.num_draft_tokens,
        "medusa.num_accepted_tokens": work.num_accepted_tokens,
        "medusa.mean_acceptance_length": work.mean_acceptance_length,
    }
