"""A request joins its caller's trace or begins one, hands it on, and a collector costs nothing but spans."""

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry

from service import tracing
from service.metrics import HttpMetrics
from service.middleware import Door
from service.probes import Drain
from service.settings import Settings
from tests.service.wire import TinyWorker, Workers, api, api_settings, write_catalog

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"


class Collector:
    """An OTLP/HTTP collector that remembers, or fails."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.bodies, self.paths = status, list[dict[str, Any]](), list[str]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        self.bodies.append(json.loads(request.content))
        return httpx.Response(self.status)

    @property
    def spans(self) -> list[dict[str, Any]]:
        return [s for b in self.bodies for r in b["resourceSpans"] for scope in r["scopeSpans"] for s in scope["spans"]]


def spans_to(collector: Collector, **fields: Any) -> tuple[tracing.Spans, CollectorRegistry]:
    registry = CollectorRegistry()
    settings = Settings(otlp_endpoint="http://collector:4318/", **fields)
    transport = httpx.MockTransport(collector)
    return tracing.Spans(settings, "padrec-test", "1.0", HttpMetrics(registry), transport=transport), registry


def counted(registry: CollectorRegistry, result: str) -> float:
    return registry.get_sample_value("padrec_trace_spans_total", {"result": result}) or 0.0


def span(**fields: Any) -> tracing.Span:
    trace = tracing.Trace(TRACE, PARENT, "", True)
    return tracing.Span(trace, "GET /", 1, 2, failed=False, **fields)


def test_a_caller_s_trace_goes_on_under_a_new_span() -> None:
    trace = tracing.begin(GIVEN, "vendor=1", 0.0)
    assert (trace.trace_id, trace.parent_id, trace.sampled, trace.state) == (TRACE, PARENT, True, "vendor=1")
    assert re.fullmatch("[0-9a-f]{16}", trace.span_id) and trace.span_id != PARENT
    assert trace.headers() == {"traceparent": f"00-{TRACE}-{trace.span_id}-01", "tracestate": "vendor=1"}
    assert not tracing.begin(GIVEN[:-1] + "0", "", 1.0).sampled


@pytest.mark.parametrize(
    "header",
    [
        *("", "nonsense", GIVEN.upper(), f" {GIVEN}", f"{GIVEN}-more", f"ff-{TRACE}-{PARENT}-01", GIVEN[:-1]),
        *(f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[1:]}-{PARENT}-01", f"0x{GIVEN[2:]}"),
    ],
)
def test_a_malformed_parent_is_none_and_its_state_is_dropped(header: str) -> None:
    trace = tracing.begin(header, "vendor=1", 0.0)
    assert trace.trace_id != TRACE and len(trace.trace_id) == 32
    assert (trace.parent_id, trace.state, trace.sampled) == ("", "", False)


def test_a_later_version_may_say_more() -> None:
    assert tracing.begin(f"01-{TRACE}-{PARENT}-01-later", "", 0.0).parent_id == PARENT


def test_what_we_hand_on_others_can_read() -> None:
    trace = tracing.begin(GIVEN, "a=1,b=2", 0.0)
    context = TraceContextTextMapPropagator().extract(trace.headers())
    carried: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carried, context)
    assert carried == trace.headers()


def test_of_new_traces_the_wanted_share_is_sampled() -> None:
    dice = random.Random(0)
    sampled = sum(tracing.begin("", "", 0.25, dice).sampled for _ in range(2000))
    assert 420 < sampled < 580


async def test_the_collector_gets_spans_as_otlp_says() -> None:
    collector = Collector()
    spans, registry = spans_to(collector)
    spans.add(span(attributes={"n": 3, "x": 0.5, "s": "text", "l": ["a"], "b": True}))
    await spans.close()
    assert collector.paths == ["/v1/traces"]
    (resource,) = collector.bodies[0]["resourceSpans"]
    assert {"key": "service.name", "value": {"stringValue": "padrec-test"}} in resource["resource"]["attributes"]
    (sent,) = collector.spans
    assert (sent["traceId"], sent["spanId"], sent["kind"]) == (TRACE, PARENT, 2)
    assert (sent["startTimeUnixNano"], sent["endTimeUnixNano"], sent["status"]) == ("1", "2", {})
    assert [each["value"] for each in sent["attributes"]] == [
        {"intValue": "3"},
        {"doubleValue": 0.5},
        {"stringValue": "text"},
        {"arrayValue": {"values": [{"stringValue": "a"}]}},
        {"boolValue": True},
    ]
    assert (counted(registry, "sent"), counted(registry, "dropped")) == (1, 0)


async def test_a_failing_collector_costs_the_spans_and_says_so() -> None:
    spans, registry = spans_to(Collector(503))
    for _ in range(3):
        spans.add(span())
    await spans.close()
    assert (counted(registry, "sent"), counted(registry, "dropped")) == (0, 3)


async def test_spans_wait_in_a_bounded_line_and_are_sent_in_batches() -> None:
    collector = Collector()
    spans, registry = spans_to(collector)
    for _ in range(tracing.MAX_WAITING + 5):
        spans.add(span())
    assert counted(registry, "dropped") == 5
    await spans.close()
    assert len(collector.spans) == tracing.MAX_WAITING
    assert len(collector.bodies) == tracing.MAX_WAITING // tracing.MAX_BATCH


async def test_a_running_process_sends_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "SEND_SECONDS", 0.01)
    collector = Collector()
    spans, _ = spans_to(collector)
    task = asyncio.create_task(spans.run())
    spans.add(span())
    async with asyncio.timeout(5):
        while not collector.spans:  # noqa: ASYNC110 - the collector has no event to wait for
            await asyncio.sleep(0.01)
    task.cancel()
    await spans.close()


async def test_without_a_collector_nothing_is_kept() -> None:
    registry = CollectorRegistry()
    spans = tracing.Spans(Settings(), "padrec-test", "1.0", HttpMetrics(registry))
    spans.add(span())
    await spans.run()
    await spans.close()
    assert spans.sample == 0.0
    assert (counted(registry, "sent"), counted(registry, "dropped")) == (0, 0)


async def test_a_request_becomes_a_span_with_route_and_outcome_and_a_probe_does_not() -> None:
    collector = Collector()
    spans, _ = spans_to(collector, trace_percent=100.0)
    app = FastAPI()
    app.add_middleware(Door, metrics=HttpMetrics(CollectorRegistry()), drain=Drain(), spans=spans)

    @app.get("/things/{name}")
    async def things(name: str) -> str:
        return name

    @app.get("/healthz")
    async def healthz() -> str:
        return "ok"

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://door") as client:
        await client.get("/things/secret-item", headers={"traceparent": GIVEN})
        await client.get("/healthz")
        await client.get("/nowhere")
    await spans.close()
    first, second = collector.spans
    assert (first["name"], first["parentSpanId"]) == ("GET /things/{name}", PARENT)
    assert "secret-item" not in json.dumps(collector.bodies)
    assert second["name"] == "GET unmatched"


async def test_the_worker_is_told_the_trace_of_the_request(tmp_path: Path) -> None:
    catalog = write_catalog(tmp_path)
    seen: list[str] = []

    class Listening(TinyWorker):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            headers = dict(scope.get("headers", ()))
            if scope.get("path") == "/generate":
                seen.append(headers[b"traceparent"].decode())
            await super().__call__(scope, receive, send)

    async with api(api_settings(catalog_file=catalog), Workers(w1=Listening())) as client:
        await client.post("/recommend", json={"history": ["i1"]}, headers={"traceparent": GIVEN})
        await client.post("/recommend", json={"history": ["i1"]})
    theirs, fresh = seen
    assert theirs.startswith(f"00-{TRACE}-") and theirs.endswith("-01") and PARENT not in theirs
    assert not fresh.startswith(f"00-{TRACE}-") and fresh.endswith("-00")
