"""The door, as one pure ASGI layer: request ID, counting, access log, last-resort errors; and what routes use at it:
bounded body reading, the deadline, the client's disconnect.

Knows no bodies' meaning. Every answer carries X-Request-Id.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import log, tracing
from service.errors import (
    PROBLEM_JSON,
    BodyTimeout,
    BodyTooLarge,
    Busy,
    ClientGone,
    Draining,
    HttpError,
    InternalError,
    Invalid,
    Overloaded,
    PadrecError,
    WrongContentType,
    problem_bytes,
)
from service.keys import Keys
from service.metrics import HttpMetrics
from service.probes import Drain

T = TypeVar("T")
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGITS = re.compile(r"[0-9]{1,9}")
_TIMEOUT_HEADER = b"x-request-timeout-ms"
_PROBES = {"/healthz", "/readyz", "/metrics", "/info"}

access = logging.getLogger("padrec.access")
logger = logging.getLogger("padrec.error")


@dataclass
class Ticket:
    """One request at the door. `request_id` is the caller's, `internal_id` is ours and always fresh.

    `started` is in `time.monotonic()` seconds. `refused`: whether a refusal of it, or of a part, has been counted.
    """

    request_id: str
    internal_id: str
    started: float
    trace: tracing.Trace
    outcome: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    refused: bool = False


class Door:
    """Wraps a whole application: gives each request a Ticket and sees that it is answered, counted and logged."""

    def __init__(
        self, app: ASGIApp, *, metrics: HttpMetrics, drain: Drain, spans: tracing.Spans, keys: Keys | None = None
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.drain = drain
        self.spans = spans
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ticket = _ticket(scope, self.spans.sample)
        scope.setdefault("state", {})["ticket"] = ticket
        tokens = log.request_id.set(ticket.request_id), log.trace_id.set(ticket.trace.trace_id)
        trace_token = tracing.current.set(ticket.trace)
        status = 0

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                stamp = (b"x-request-id", ticket.request_id.encode())
                message = {**message, "headers": [*message["headers"], stamp]}
            await send(message)

        self.drain.in_flight += 1
        self.metrics.inflight.inc()
        try:
            if self.keys is not None and (name := self.keys.admit(scope["path"], scope["headers"])):
                ticket.fields["key"] = name
            await self.app(scope, receive, send_stamped)
        except PadrecError as error:  # of the keys: what happens inside has been answered inside
            await problem_response(error, ticket)(scope, receive, send_stamped)
        except Exception as exc:
            logger.error("request crashed", extra=log.crash_fields(exc))
            ticket.outcome = "error"
            if not status:
                response = problem_response(InternalError("An internal error happened."), ticket)
                await response(scope, receive, send_stamped)
        finally:
            self.drain.in_flight -= 1
            self.metrics.inflight.dec()
            self._record(scope, ticket, status)
            tracing.current.reset(trace_token)
            log.trace_id.reset(tokens[1])
            log.request_id.reset(tokens[0])

    def _record(self, scope: Scope, ticket: Ticket, status: int) -> None:
        # The route's template, never the path: unknown paths must not become labels.
        route = getattr(scope.get("route"), "path", "unmatched")
        seconds = time.monotonic() - ticket.started
        outcome = ticket.outcome or _outcome(status)
        self.metrics.requests.labels(route, outcome).inc()
        self.metrics.duration.labels(route, outcome).observe(seconds)
        level = logging.DEBUG if route in _PROBES else logging.INFO
        if access.isEnabledFor(level):
            fields = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "outcome": outcome,
                "duration_ms": round(seconds * 1000, 3),
            }
            access.log(level, "request", extra=fields | ticket.fields)
        if ticket.trace.sampled and route not in _PROBES:
            end = time.time_ns()
            self.spans.add(
                tracing.Span(
                    ticket.trace,
                    f"{scope['method']} {route}",
                    end - round(seconds * 1e9),
                    end,
                    failed=status >= 500,
                    attributes={
                        "http.request.method": scope["method"],
                        "http.route": route,
                        "http.response.status_code": status,
                        "padrec.outcome": outcome,
                        "padrec.request_id": ticket.request_id,
                        **{f"padrec.{name}": value for name, value in ticket.fields.items()},
                    },
                )
            )


class Admission:
    """Bounds the requests worked on at once; the rest is refused before its body is read."""

    def __init__(self, limit: int, drain: Drain, metrics: HttpMetrics) -> None:
        self.limit = limit
        self.drain = drain
        self.metrics = metrics
        self.running = 0
        self._stay_seconds = 0.0

    @contextmanager
    def admit(self, count: int = 1) -> Iterator[None]:
        """Room for `count` requests while the block runs. Raises Draining or Overloaded."""
        if self.drain.refusing:
            raise self.refused(Draining("This process is shutting down."))
        if self.running + count > self.limit:
            refusal = Overloaded("Too many requests are being worked on.", retry_after=self._retry_after(count))
            raise self.refused(refusal)
        self.running += count
        started = time.monotonic()
        try:
            yield
        finally:
            self.running -= count
            self._stay_seconds += 0.1 * (time.monotonic() - started - self._stay_seconds)

    def _retry_after(self, count: int) -> float:
        """Seconds until `count` should have left: of a full house one leaves every `stay / limit`."""
        return self._stay_seconds * min(1.0, (self.running + count - self.limit) / self.limit)

    def refused(self, error: Busy, reason: str | None = None) -> Busy:
        """Count a refusal; `reason` where the error's name does not say enough."""
        self.metrics.rejections.labels(reason or error.slug).inc()
        return error


def install_errors(app: FastAPI) -> None:
    """One shape for every refusal: ours and the router's."""

    async def ours(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, PadrecError)
        return problem_response(exc, request.state.ticket)

    async def routers(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        response = problem_response(HttpError(exc.status_code, str(exc.detail)), request.state.ticket)
        response.headers.update(exc.headers or {})
        return response

    app.add_exception_handler(PadrecError, ours)
    app.add_exception_handler(HTTPException, routers)


def problem_response(error: PadrecError, ticket: Ticket) -> Response:
    """The problem+json for `error`; also notes the outcome on the ticket."""
    ticket.outcome = error.outcome
    ticket.fields["problem"] = error.slug
    return Response(
        problem_bytes(error, ticket.request_id),
        status_code=error.status,
        headers=error.headers(),
        media_type=PROBLEM_JSON,
    )


async def read_json_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """The raw body of a JSON request. Raises WrongContentType, BodyTooLarge, BodyTimeout or ClientGone.

    The limit holds for what arrives, whatever Content-Length says.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise WrongContentType("Send the body as application/json.")
    too_large = BodyTooLarge(f"The body is larger than {max_bytes} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    total = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("The client left before its body was read.")
                chunks.append(message.get("body", b""))
                total += len(chunks[-1])
                if total > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {seconds:g} seconds.") from None


def header_deadline_ms(request: Request) -> int | None:
    """X-Request-Timeout-Ms, if sent. Raises Invalid: it names the header, for no pointer can."""
    for name, value in request.scope["headers"]:
        if name == _TIMEOUT_HEADER:
            digits = value.decode("latin-1").strip()
            if not _DIGITS.fullmatch(digits) or int(digits) < 1:
                raise Invalid("The header X-Request-Timeout-Ms should be a positive integer.")
            return int(digits)
    return None


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """`work`'s result; cancels it and raises ClientGone as soon as the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("The client left before the answer was ready.")
    finally:
        gone.cancel()
        await cancel(task)


async def cancel(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait until it has ended; its result is dropped."""
    # Again and again: asyncio.wait_for of Python 3.11, which redis-py uses, sometimes swallows a cancellation.
    while not task.done():
        task.cancel()
        await asyncio.wait((task,), timeout=0.05)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _ticket(scope: Scope, sample: float) -> Ticket:
    internal_id = uuid.uuid4().hex
    request_id, parent, state = internal_id, "", ""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            request_id = given if _PLAIN_ID.fullmatch(given) else internal_id
        elif name == b"traceparent":
            parent = value.decode("latin-1")
        elif name == b"tracestate":
            state = value.decode("latin-1")
    return Ticket(request_id, internal_id, time.monotonic(), tracing.begin(parent, state, sample))


def _outcome(status: int) -> str:
    if status == 0:
        return "cancelled"
    if status >= 500:
        return "error"
    return "rejected" if status >= 400 else "ok"
