"""The API application: acquires Redis, catalog and workers in its lifespan and releases them in reverse.

Free of torch and `model`: it starts in a moment and runs in small pods.
"""

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from service import __version__
from service.api.catalog import Catalog
from service.api.recommender import Recommender
from service.api.redis_cache import RedisCache
from service.api.routes import add_schemas, recommend_routes
from service.api.worker_client import WorkerClient, addresses, as_named
from service.api.worker_transport import WorkerTransport
from service.keys import Keys, KeysError
from service.metrics import ApiMetrics, new_registry
from service.middleware import Admission, Door, cancel, install_errors
from service.probes import Drain, Health, metrics_server, probe_routes
from service.redis_client import connect
from service.settings import Settings, SettingsError
from service.tracing import Spans


def create_app(
    settings: Settings,
    drain: Drain | None = None,
    *,
    worker_transport: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """The application. `worker_transport` replaces the network on the way to the workers, and its names. Raises
    SettingsError for a keys file that cannot be used."""
    drain = drain or Drain()
    registry = new_registry()
    metrics = ApiMetrics(registry)
    metrics.build_info.labels(__version__, "api").set(1)
    patience = settings.redis_timeout_ms / 1000
    cache = RedisCache(connect(settings.redis_url.get_secret_value(), patience), metrics, patience)
    catalog = Catalog(cache, settings, metrics)
    transport = worker_transport or WorkerTransport()
    workers = WorkerClient(transport, settings, metrics, as_named if worker_transport else addresses)
    recommender = Recommender(catalog, workers, settings, metrics)
    spans = Spans(settings, "padrec-api", __version__, metrics)
    admission = Admission(settings.max_in_flight, drain, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(cache.close)
            stack.push_async_callback(transport.aclose)
            stack.push_async_callback(spans.close)
            stack.enter_context(metrics_server(settings.host, settings.metrics_port, registry))
            await catalog.start()
            await workers.discover()
            await workers.look_at_all()
            for background in (catalog.follow(), workers.poll(), spans.run()):
                stack.push_async_callback(cancel, asyncio.create_task(background))
            yield

    def ready() -> Health:
        checks = {
            "catalog": "ok" if catalog.current else "missing",
            "redis": "ok" if cache.up else "down",
            "worker": "ok" if workers.any_up else "down",
        }
        # Popular items can be served without Redis and without workers, so neither decides.
        return Health(catalog.current is not None, checks)

    app = FastAPI(
        title="padrec",
        version=__version__,
        summary="Recommendations by a generative model with speculative decoding",
        lifespan=lifespan,
    )
    app.add_middleware(Door, metrics=metrics, drain=drain, spans=spans, keys=_keys(settings))
    install_errors(app)
    app.include_router(recommend_routes(recommender, admission, settings))
    app.include_router(
        probe_routes(
            drain=drain,
            alive=lambda: Health(True, {"process": "ok"}),
            ready=ready,
            registry=None if settings.metrics_port else registry,
        )
    )
    plain_openapi = app.openapi
    described: dict[str | None, dict[str, Any]] = {}

    def openapi() -> dict[str, Any]:
        version = None if catalog.current is None else catalog.current.version
        if version not in described:
            attributes = None if catalog.current is None else catalog.current.header.attributes
            described.clear()
            described[version] = add_schemas(copy.deepcopy(plain_openapi()), settings, attributes)
        return described[version]

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _keys(settings: Settings) -> Keys | None:
    try:
        return Keys.of_file(settings.api_keys_file) if settings.api_keys_file else None
    except KeysError as exc:
        raise SettingsError(f"setting 'api_keys_file' (PADREC_API_KEYS_FILE): {exc}") from exc
