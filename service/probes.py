"""/healthz, /readyz and /metrics for either app, and the drain they report. Knows nothing of recommendations.

Liveness asks whether the process should be killed: it stays 200 while draining. Readiness asks whether to send
requests here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

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
    registry: CollectorRegistry,
    before_scrape: Callable[[], None] = lambda: None,
) -> APIRouter:
    """The three routes. `before_scrape` may refresh gauges."""
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

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        before_scrape()
        return Response(exposition(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _answer(health: Health, yes: str, no: str) -> JSONResponse:
    return JSONResponse(
        {"status": yes if health.ok else no, "checks": dict(health.checks)},
        status_code=200 if health.ok else 503,
    )
