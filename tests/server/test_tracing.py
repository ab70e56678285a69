"""Spans of requests: what they say, whose trace they join, and that a broken collector hurts nobody."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from medusa_core.errors import ConfigError, EngineDeadError
from server.tracing import RequestTracer, otlp_tracer
from tests.server.fakes import FakeClient

BODY = {"model": "tiny", "prompt": "Hi there", "temperature": 0.5, "seed": 3, "max_tokens": 9}
MESSAGES = [{"role": "user", "content": "Hi"}]
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def make_traced(make_http, spans):
    async def make(client=None, *, sampler=None, **options):
        http = await make_http(client, **options)
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(spans))
        http.app.state.serving.tracer = RequestTracer(provider)
        return http

    return make


async def test_a_span_follows_the_conventions(make_traced, spans):
    client = FakeClient()
    http = await make_traced(client, api_key=("alice=one",))
    headers = {"authorization": "Bearer one", "x-request-id": "abc"}
    answer = (await http.post("/v1/completions", json=BODY, headers=headers)).json()
    *phases, span = spans.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == ("text_completion tiny", SpanKind.SERVER, StatusCode.UNSET)
    told = dict(span.attributes)
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") < 60
    speculation = answer["metrics"]["speculative_decoding"]
    assert told == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "medusa",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "medusa.request_id": "abc",
        "medusa.api_key_name": "alice",
        "medusa.queue_time_s": 0.01,
        "medusa.num_drafts": speculation["num_spec_steps"],
        "medusa.num_draft_tokens": speculation["num_draft_tokens"],
        "medusa.num_accepted_tokens": speculation["num_accepted_draft_tokens"],
        "medusa.mean_acceptance_length": speculation["mean_acceptance_length"],
    }
    queue, prefill, decode = phases
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert all(phase.parent.span_id == span.context.span_id for phase in phases)
    assert queue.start_time == span.start_time
    assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
    assert decode.end_time <= span.end_time
    assert abs(span.end_time - time.time_ns()) < 60e9


@pytest.mark.parametrize(("path", "body"), [("chat/completions", {"messages": MESSAGES}), ("responses", {"input": "Hi"})])
async def test_streams_of_chats_and_responses_have_one_too(make_traced, spans, path, body):
    response = await (await make_traced()).post(f"/v1/{path}", json={"model": "tiny", "stream": True, **body})
    *_, span = spans.get_finished_spans()
    assert span.name == "chat tiny"
    assert span.attributes["gen_ai.response.id"] in response.text


async def test_a_callers_trace_is_joined_and_its_choice_of_sampling_kept(make_traced, spans, caplog):
    caplog.set_level(logging.INFO, logger="server.access")
    http = await make_traced()
    await http.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
    *_, span = spans.get_finished_spans()
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert caplog.records[-1].msg["trace_id"] == TRACE_ID
    spans.clear()
    await http.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"})
    assert not spans.get_finished_spans()
    await http.post("/v1/completions", json=BODY, headers={"traceparent": "nonsense\x7f"})
    *_, span = spans.get_finished_spans()
    assert span.parent is None


async def test_what_is_not_sampled_is_not_described(make_traced, spans, monkeypatch):
    http = await make_traced(sampler=ParentBased(ALWAYS_OFF))
    monkeypatch.setattr(RequestTracer, "_describe", None)
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    assert not spans.get_finished_spans()


@pytest.mark.parametrize(
    ("client", "change", "error", "is_failed"),
    [
        (FakeClient(), {"temperature": 9}, "invalid_value", False),
        (FakeClient(failure=EngineDeadError("Dead.")), {}, "engine_dead", True),
        (FakeClient(failure=EngineDeadError("Dead."), num_free_steps=2), {"stream": True}, "engine_dead", True),
    ],
)
async def test_failures_are_marked(make_traced, spans, client, change, error, is_failed):
    await (await make_traced(client)).post("/v1/completions", json={**BODY, **change})
    span = spans.get_finished_spans()[-1]
    assert span.attributes["error.type"] == error
    assert (span.status.status_code is StatusCode.ERROR) == is_failed


async def test_nothing_else_is_traced(make_traced, spans):
    http = await make_traced()
    for path in ("/health", "/metrics", "/v1/models", "/nope"):
        await http.get(path)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        await http.get(path)
        await http.options(path, headers={"origin": "http://page", "access-control-request-method": "POST"})
    assert not spans.get_finished_spans()


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    server = HTTPServer(("127.0.0.1", 0), Collector)
    server.received = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


async def test_spans_reach_a_collector_before_the_server_ends(make_http, collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    http = await make_http(otlp_traces_endpoint=endpoint)
    assert (await http.post("/v1/completions", json={**BODY, "stream": True})).status_code == 200
    await http.app.state.serving.close()
    ((path, request),) = collector.received
    (resource_spans,) = request.resource_spans
    assert path == "/v1/traces"
    assert {a.key: a.value.string_value for a in resource_spans.resource.attributes}["service.name"] == "mine"
    assert sorted(span.name for span in resource_spans.scope_spans[0].spans) == [
        "decode",
        "prefill",
        "queue",
        "text_completion tiny",
    ]


async def test_without_a_collector_requests_are_answered_and_the_end_is_not_held_up(make_http):
    http = await make_http(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    answers = await asyncio.gather(*(http.post("/v1/completions", json=BODY) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    async with asyncio.timeout(30):
        await http.app.state.serving.close()


def test_a_wrong_endpoint_or_a_missing_package_is_told_at_start(monkeypatch):
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        otlp_tracer("collector:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[otel\]"'):
        otlp_tracer("http://collector:4318/v1/traces")
