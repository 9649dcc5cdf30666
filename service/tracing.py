"""W3C trace context in, out and, where a collector is named, to it by OTLP.

Every request belongs to a trace: the caller's (`traceparent`, `tracestate`) or a fresh one; its ID is in the log, and
the API hands it on to the worker. A sampled request's span goes to the collector as OTLP/HTTP in its JSON form
(opentelemetry.io, "OTLP Specification"): one POST of a few lines, for which the SDK would bring six packages into the
small image. A caller's sampling flag is obeyed; the setting `trace_percent` decides for the rest.

Knows no routes and no bodies: others hand in names and numbers. A collector that is slow or away
costs spans, never requests.
"""

import asyncio
import logging
import random
import re
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpx

from service.metrics import HttpMetrics
from service.settings import Settings

MAX_WAITING = 2048
MAX_BATCH = 512
SEND_SECONDS = 1.0
POST_TIMEOUT_SECONDS = 2.0
MAX_STATE = 512  # characters of tracestate that the recommendation asks everybody to carry

# version 00: 55 characters; a later version may add fields behind another hyphen.
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

logger = logging.getLogger("padrec.tracing")


@dataclass(frozen=True)
class Trace:
    """Where one request stands in its trace. IDs in lower-case hex, `parent_id` empty at the root."""

    trace_id: str
    span_id: str
    parent_id: str
    sampled: bool
    state: str = ""

    def headers(self) -> dict[str, str]:
        """What the next process is told: this span is its parent."""
        told = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"}
        return told | ({"tracestate": self.state} if self.state else {})


current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current_headers() -> dict[str, str]:
    """Headers that hand the current request's trace on; none outside a request."""
    trace = current.get()
    return trace.headers() if trace else {}


def begin(parent: str, state: str, sample: float, dice: random.Random | None = None) -> Trace:
    """The trace of a request that came with these headers ("" where absent). `sample`: the share, 0..1, of traces begun
    here that are sampled. A malformed header is as good as none."""
    found = _PARENT.fullmatch(parent)
    if found and _is_valid(*found.groups()):
        _, trace_id, parent_id, flags, _ = found.groups()
        state = state if len(state) <= MAX_STATE and state.isascii() and state.isprintable() else ""
        return Trace(trace_id, secrets.token_hex(8), parent_id, bool(int(flags, 16) & 1), state)
    sampled = (dice or random).random() < sample
    return Trace(secrets.token_hex(16), secrets.token_hex(8), "", sampled)


def _is_valid(version: str, trace_id: str, parent_id: str, flags: str, rest: str | None) -> bool:
    del flags
    return version != "ff" and int(trace_id, 16) != 0 and int(parent_id, 16) != 0 and (version != "00" or rest is None)


@dataclass(frozen=True)
class Span:
    """One request as a collector shows it. Times in nanoseconds since 1970; attributes are counts, times and names."""

    trace: Trace
    name: str
    start: int
    end: int
    failed: bool
    attributes: Mapping[str, str | int | float | Sequence[str]] = field(default_factory=dict)


class Spans:
    """Collects sampled spans and sends them to the collector; without an endpoint it drops them unseen."""

    def __init__(
        self,
        settings: Settings,
        service_name: str,
        version: str,
        metrics: HttpMetrics,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`transport` replaces the network on the way to the collector."""
        self.sample = settings.trace_percent / 100 if settings.otlp_endpoint else 0.0
        self._url = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces" if settings.otlp_endpoint else ""
        self._resource = _attributes({"service.name": service_name, "service.version": version})
        self._scope = {"name": "padrec", "version": version}
        self._sent = metrics.trace_spans.labels("sent")
        self._dropped = metrics.trace_spans.labels("dropped")
        # The environment's proxies are for the outside; a collector is named by us.
        self._client = (
            httpx.AsyncClient(transport=transport, timeout=POST_TIMEOUT_SECONDS, trust_env=False)
            if settings.otlp_endpoint
            else None
        )
        self._waiting: deque[Span] = deque()

    def add(self, span: Span) -> None:
        """Keep a span until it is sent; a full line drops it."""
        if not self._client or not span.trace.sampled:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._dropped.inc()
        else:
            self._waiting.append(span)

    async def run(self) -> None:
        """Send what has come together, for ever."""
        while self._client:
            await asyncio.sleep(SEND_SECONDS)
            await self._send_all(self._client)

    async def close(self) -> None:
        """Send the rest. Call it when `run` has ended."""
        if self._client:
            await self._send_all(self._client)
            await self._client.aclose()

    async def _send_all(self, client: httpx.AsyncClient) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            try:
                (await client.post(self._url, json=self._body(batch))).raise_for_status()
                self._sent.inc(len(batch))
            except httpx.HTTPError as exc:
                self._dropped.inc(len(batch))
                logger.warning("spans were not sent", extra={"spans": len(batch), "error": type(exc).__name__})
                return

    def _body(self, batch: Sequence[Span]) -> dict[str, Any]:
        spans = [
            {
                "traceId": span.trace.trace_id,
                "spanId": span.trace.span_id,
                "parentSpanId": span.trace.parent_id,
                "traceState": span.trace.state,
                "name": span.name,
                "kind": 2,  # SPAN_KIND_SERVER
                "startTimeUnixNano": str(span.start),
                "endTimeUnixNano": str(span.end),
                "attributes": _attributes(span.attributes),
                "status": {"code": 2} if span.failed else {},  # STATUS_CODE_ERROR
            }
            for span in batch
        ]
        scope = {"scope": self._scope, "spans": spans}
        return {"resourceSpans": [{"resource": {"attributes": self._resource}, "scopeSpans": [scope]}]}


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}  # 64-bit numbers are strings in protobuf's JSON
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, (list, tuple)):
        return {"arrayValue": {"values": [_value(each) for each in value]}}
    return {"stringValue": str(value)}
