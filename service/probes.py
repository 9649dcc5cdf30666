"""/healthz, /readyz and /metrics for either app, and the drain they report. Knows nothing of recommendations.

Liveness asks whether the process should be killed: it stays 200 while draining. Readiness asks whether to send
requests here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, start_http_server

from service.metrics import exposition


@dataclass
class Drain:
    """How far this process is on its way out: serving → unready → refusing → gone."""

    unready: bool = False
    refusing: bool = False
    in_flight: int = 0


@dataclass(frozen=True)
class Health:
    """`checks` names each part and its state in a word; `ok` decides the status code."""

    ok: bool
    checks: Mapping[str, str]


def probe_routes(
    *,
    drain: Drain,
    alive: Callable[[], Health],
    ready: Callable[[], Health],
    registry: CollectorRegistry | None,
) -> APIRouter:
    """The three routes; without a `registry` /metrics is not among them (it has a port of its own)."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", summary="Is the process alive?")
    async def healthz() -> JSONResponse:
        return _answer(alive(), "alive", "dead")

    @router.get("/readyz", summary="Should requests be sent here?")
    async def readyz() -> JSONResponse:
        health = ready()
        if drain.unready:
            health = Health(False, {**health.checks, "drain": "draining"})
        return _answer(health, "ready", "unready")

    if registry is not None:

        @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
        async def metrics() -> Response:
            return Response(exposition(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


@contextmanager
def metrics_server(host: str, port: int, registry: CollectorRegistry) -> Iterator[None]:
    """/metrics on a port of its own while the block runs; port 0: nothing. Raises OSError where the port is taken."""
    if not port:
        yield
        return
    server, thread = start_http_server(port, host, registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(health: Health, yes: str, no: str) -> JSONResponse:
    return JSONResponse(
        {"status": yes if health.ok else no, "checks": dict(health.checks)},
        status_code=200 if health.ok else 503,
    )
