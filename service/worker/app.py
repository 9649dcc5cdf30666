"""The worker process: load a bundle, warm the engine up, answer `/generate`, publish what the engine observes.

Knows bundle, engine and metrics; decides nothing about requests.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter

from model.bundle import load_bundle
from model.decoding.beam_request import BeamResult, BeamStats
from model.decoding.catalog_index import CatalogIndex
from model.decoding.request import ListResult, RoundStats
from model.decoding.strategies import Stats, Strategies, beams_of
from service import __version__
from service.keys import Keys
from service.metrics import WorkerMetrics, new_registry
from service.middleware import Admission, Door, cancel, install_errors
from service.probes import Drain, Health, metrics_server, probe_routes
from service.settings import Settings, SettingsError
from service.tracing import Spans
from service.worker.catalog_feed import CatalogFeed
from service.worker.engine import Edition, Engine
from service.worker.routes import Served, generate_routes
from service.worker.shadow import Shadow

# Metrics keep what is lossy apart: a relaxed answer's numbers must not pass for an exact one's.
LIST, BEAM, RELAXED = "list", "beam", "beam-relaxed"

logger = logging.getLogger("padrec.worker")


def load_app(settings: Settings, drain: Drain) -> FastAPI:
    """The application around the bundle the settings name. Raises SettingsError or `model.bundle.BundleError`."""
    if settings.bundle is None:
        raise SettingsError("setting 'bundle' (PADREC_BUNDLE, --bundle): the worker needs one")
    torch.set_num_threads(num_threads(settings))
    bundle = load_bundle(settings.bundle, dtype=settings.dtype, device=settings.device)
    logger.info("bundle loaded", extra={"layers": "compiled kernel" if bundle.target.native else "torch"})
    decoder = bundle.strategies(
        num_rows=settings.num_rows, max_k=settings.max_k, prefill_tokens=settings.prefill_tokens
    )
    info = bundle.info
    golden = bundle.golden_requests(min(8, len(bundle.catalog.items)))
    served = Served(info.name, info.version, settings.max_k, info.max_history_items)
    registry = new_registry()
    metrics = WorkerMetrics(registry)

    def warm_up(decoder: Strategies) -> None:
        try:
            bundle.warm_up(decoder, settings.measurements)
        except OSError as exc:
            logger.warning("what was measured cannot be kept", extra={"reason": str(exc)})

    engine = Engine(
        decoder,
        max_waiting=settings.max_waiting,
        observe=publisher(metrics, served.version),
        warm_up=warm_up,
        version=info.catalog_version,
        golden=[*golden, *beams_of(golden)],
        max_wait_seconds=settings.max_wait_ms / 1000,
    )

    def edition(index: CatalogIndex) -> Edition:
        """What serves another catalog version: the same target and drafts, what they have learned, rows of its own."""
        made = bundle.strategies(
            num_rows=settings.num_rows,
            max_k=settings.max_k,
            prefill_tokens=settings.prefill_tokens,
            catalog=index,
            learned=engine.decoder,
        )
        # Few: they take their time from requests.
        golden = index.golden_requests(4, info.max_history_items)
        return Edition(index.version, made, [*golden, *beams_of(golden[:2])])

    feed = CatalogFeed(engine, edition, bundle.target.vocabulary, served, settings, metrics)
    return create_app(engine, served, settings, drain, metrics, registry, feed)


def create_app(
    engine: Engine,
    served: Served,
    settings: Settings,
    drain: Drain,
    metrics: WorkerMetrics,
    registry: CollectorRegistry,
    feed: CatalogFeed | None = None,
) -> FastAPI:
    """The application around an engine that has not been started. Without a `feed` its catalog never changes."""
    started = time.monotonic()
    metrics.build_info.labels(__version__, "worker").set(1)
    metrics.set_model(served.name, served.version, engine.catalog_version)
    metrics.running_requests.set_function(lambda: engine.status().running)
    metrics.queue_requests.set_function(lambda: engine.status().waiting)
    metrics.queue_oldest_age.set_function(lambda: engine.status().oldest_wait_seconds)

    if settings.device != "cpu":
        metrics.gpu_memory.labels("allocated").set_function(lambda: torch.cuda.memory_allocated(settings.device))
        metrics.gpu_memory.labels("reserved").set_function(lambda: torch.cuda.memory_reserved(settings.device))
    spans = Spans(settings, "padrec-worker", __version__, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        engine.start()
        tasks = [asyncio.create_task(_time_warm_up(engine, metrics, started)), asyncio.create_task(spans.run())]
        if feed is not None:
            tasks.append(asyncio.create_task(feed.follow()))
        try:
            with metrics_server(settings.host, settings.metrics_port, registry):
                yield
        finally:
            for task in tasks:
                await cancel(task)
            await spans.close()
            engine.drain(0)  # nobody is left to answer: the server has waited for running requests already
            await asyncio.to_thread(engine.stop)
            if feed is not None:
                await feed.close()

    app = FastAPI(title="padrec worker", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    install_errors(app)
    # Running and waiting are the engine's to bound; this bounds bodies being read.
    admission = Admission(settings.num_rows + settings.max_waiting + settings.num_rows, drain, metrics)
    shadow = Shadow(engine, settings.shadow_percent, metrics)
    app.include_router(generate_routes(engine, served, settings, admission, shadow))
    app.include_router(
        probe_routes(
            drain=drain,
            alive=lambda: _alive(engine),
            ready=lambda: _ready(engine),
            registry=None if settings.metrics_port else registry,
        )
    )
    keys = Keys.of_secret(settings.worker_key.get_secret_value()) if settings.worker_key else None
    app.add_middleware(Door, metrics=metrics, drain=drain, spans=spans, keys=keys)
    return app


def num_threads(settings: Settings) -> int:
    """Threads that decode. One core is left to the API and Valkey: two threads on a busy two-core machine are slower
    than one."""
    return settings.threads or max(1, (os.cpu_count() or 2) - 1)


def publisher(metrics: WorkerMetrics, model_version: str) -> Callable[[Stats | ListResult], None]:
    """What the engine calls after every round and every answer. Runs on the engine's thread."""
    publish_round = RoundPublisher(metrics)

    def publish(seen: Stats | ListResult) -> None:
        if isinstance(seen, RoundStats):
            publish_round(seen)
        elif isinstance(seen, BeamStats):
            publish_pass(metrics, seen)
        else:
            publish_list(metrics, seen, model_version)

    return publish


class RoundPublisher:
    """Call it with every round: how many took part, where its time went, what it drafted and kept by step and slot.

    Counters are looked up by label once: that took a tenth of a round that drafts, with warm caches."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._batch_size, self._prompts = (metrics.batch_size.labels(phase) for phase in ("decode", "prefill"))
        self._draft, self._verify = (metrics.stage.labels(stage) for stage in ("draft", "verify"))
        self._passes, self._saved = (m.labels(LIST) for m in (metrics.target_passes, metrics.target_passes_saved))
        self._skipped = metrics.spec_skipped_rounds.labels(LIST)
        by_step = (metrics.draft_per_position, metrics.accepted_per_position)
        by_slot = (metrics.draft_per_slot, metrics.accepted_per_slot)
        self._by_place: list[tuple[Counter, list[Counter]]] = [(counter, []) for counter in (*by_step, *by_slot)]

    def __call__(self, stats: RoundStats) -> None:
        if stats.prompts_read:
            self._prompts.observe(stats.prompts_read)
        if not stats.rows:
            return  # a share of a long prompt was read, and nobody waited for a round
        self._batch_size.observe(stats.rows)
        self._draft.observe(stats.draft_seconds)
        self._verify.observe(stats.verify_seconds)
        self._passes.inc(stats.rows)
        self._skipped.inc(not stats.draft_tokens)
        self._saved.inc(stats.accepted_tokens + stats.forced_tokens)
        counted = (stats.drafted_by_step, stats.accepted_by_step, stats.drafted_by_slot, stats.accepted_by_slot)
        for (counter, known), counts in zip(self._by_place, counted, strict=True):
            while len(known) < len(counts):
                known.append(counter.labels(LIST, str(len(known))))
            for child, count in zip(known, counts, strict=False):
                if count:
                    child.inc(count)


def publish_pass(metrics: WorkerMetrics, stats: BeamStats) -> None:
    """One pass over beams: how many took part, where its time went, the passes it took and saved."""
    if stats.prompts_read:
        metrics.batch_size.labels("prefill").observe(stats.prompts_read)
    metrics.batch_size.labels("decode").observe(stats.rows)
    if stats.draft_seconds:
        metrics.stage.labels("draft").observe(stats.draft_seconds)
    metrics.stage.labels("verify").observe(stats.verify_seconds)
    metrics.target_passes.labels(BEAM).inc(stats.rows - stats.lossy_rows)
    metrics.target_passes.labels(RELAXED).inc(stats.lossy_rows)


def publish_list(metrics: WorkerMetrics, result: ListResult, model_version: str) -> None:
    """One finished answer: its waiting, its prefill and its speculation. For beams a draft token is a node that rode
    along, an accepted one a level that needed no pass of its own, a forced one a level without a choice."""
    metrics.stage.labels("queue").observe(result.queue_seconds)
    metrics.stage.labels("prefill").observe(result.prefill_seconds)
    counts, strategy = result.speculation, LIST
    if isinstance(result, BeamResult):
        strategy = RELAXED if result.lossy else BEAM
        metrics.target_passes_saved.labels(strategy).inc(counts.accepted_tokens + counts.forced_tokens)
    if counts.draft_tokens:  # what was decoded without drafting has no acceptance length
        metrics.acceptance_length.labels(strategy).observe(counts.acceptance_length)
        metrics.spec_rounds.labels(strategy, model_version).inc(counts.rounds)
    metrics.spec_draft_tokens.labels(strategy, model_version).inc(counts.draft_tokens)
    metrics.spec_accepted_tokens.labels(strategy, model_version).inc(counts.accepted_tokens)
    metrics.spec_forced_tokens.labels(strategy, model_version).inc(counts.forced_tokens)


def _alive(engine: Engine) -> Health:
    alive = engine.status().alive
    return Health(alive, {"engine": "running" if alive else "stopped"})


def _ready(engine: Engine) -> Health:
    status = engine.status()
    state = "ready" if status.ready else "warming up or draining" if status.alive else "stopped"
    return Health(status.ready, {"engine": state})


async def _time_warm_up(engine: Engine, metrics: WorkerMetrics, started: float) -> None:
    while not engine.status().ready:  # noqa: ASYNC110 - the engine's thread knows no event loop to tell
        await asyncio.sleep(0.02)
    metrics.warmup.set(time.monotonic() - started)
