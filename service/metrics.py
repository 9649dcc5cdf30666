"""Every Prometheus object of both processes, named in one place. Counters and base units; ratios belong to PromQL.

Labels hold routes, outcomes, stages and versions: never an ID of a request, user or item. Knows no requests and
no tensors: others hand in numbers.
"""

import contextlib
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

PREFIX = "padrec"

# Seconds, from 1 ms; twice as fine below a second, where the deadlines are.
_SECONDS: tuple[float, ...] = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
)
_SHORT = (0.0001, 0.00025, 0.0005, *_SECONDS)
_ACCEPTANCE = tuple(float(n) for n in range(1, 17))
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)

OUTCOMES = ("ok", "fallback", "degraded", "rejected", "deadline", "cancelled", "error")


class HttpMetrics:
    """What both processes count at their door."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            f"{PREFIX}_requests_total",
            "HTTP requests answered",
            ("route", "outcome"),
            registry=registry,
        )
        self.duration = Histogram(
            f"{PREFIX}_request_duration_seconds",
            "Time from the request's first byte to the answer's last",
            ("route", "outcome"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.inflight = Gauge(f"{PREFIX}_inflight_requests", "HTTP requests being worked on", registry=registry)
        self.rejections = Counter(
            f"{PREFIX}_admission_rejections_total",
            "Requests refused before any work",
            ("reason",),
            registry=registry,
        )
        self.stage = Histogram(
            f"{PREFIX}_stage_duration_seconds",
            "Time in one stage of a request (draft and verify: of a round)",
            ("stage",),
            buckets=_SHORT,
            registry=registry,
        )
        self.trace_spans = Counter(
            f"{PREFIX}_trace_spans_total",
            "Spans for the collector: sent, or dropped because it is slow or away",
            ("result",),
            registry=registry,
        )
        self.build_info = Gauge(
            f"{PREFIX}_build_info",
            "Always 1; the labels say what runs",
            ("version", "process"),
            registry=registry,
        )


class ApiMetrics(HttpMetrics):
    """The API process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.cache_operations = Counter(
            f"{PREFIX}_cache_operations_total",
            "Look-ups of item mappings",
            ("cache", "op", "result"),
            registry=registry,
        )
        self.redis_duration = Histogram(
            f"{PREFIX}_redis_duration_seconds",
            "Time of one Redis round trip",
            ("op",),
            buckets=_SHORT,
            registry=registry,
        )
        self.redis_errors = Counter(
            f"{PREFIX}_redis_errors_total", "Failed Redis round trips", ("op",), registry=registry
        )
        self.catalog_items = Gauge(f"{PREFIX}_catalog_items", "Items of the active catalog", registry=registry)
        self.catalog_version_info = Gauge(
            f"{PREFIX}_catalog_version_info",
            "Always 1; the label is the active catalog version",
            ("catalog_version",),
            registry=registry,
        )
        self.unknown_items = Counter(
            f"{PREFIX}_unknown_items_total",
            "History items the catalog does not know",
            registry=registry,
        )
        self.invalid_semantic_ids = Counter(
            f"{PREFIX}_invalid_semantic_ids_total",
            "Semantic IDs from a worker that name no item; must stay 0",
            registry=registry,
        )
        self.worker_up = Gauge(f"{PREFIX}_worker_up", "1 while the worker answers", ("worker",), registry=registry)
        self.worker_retries = Counter(
            f"{PREFIX}_worker_retries_total",
            "Requests sent to a worker a second time",
            ("reason",),
            registry=registry,
        )
        self.worker_restarts = Counter(
            f"{PREFIX}_worker_restarts_total",
            "Times another process answered where a worker was known",
            ("worker",),
            registry=registry,
        )
        self.worker_ejections = Counter(
            f"{PREFIX}_worker_ejections_total",
            "Times a worker that failed again and again was left alone",
            ("worker",),
            registry=registry,
        )

    def forget_worker(self, worker: str) -> None:
        """Its address may never come back; a label for ever would be a leak."""
        for metric in (self.worker_up, self.worker_restarts, self.worker_ejections):
            with contextlib.suppress(KeyError):
                metric.remove(worker)

    def set_catalog(self, version: str, num_items: int) -> None:
        self.catalog_version_info.clear()
        self.catalog_version_info.labels(version).set(1)
        self.catalog_items.set(num_items)


class WorkerMetrics(HttpMetrics):
    """The worker process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.acceptance_length = Histogram(
            f"{PREFIX}_acceptance_length",
            "Tokens a list gained per round, the bonus token included",
            ("strategy",),
            buckets=_ACCEPTANCE,
            registry=registry,
        )
        spec = ("strategy", "model_version")
        self.spec_rounds = Counter(f"{PREFIX}_spec_rounds_total", "Draft and verify rounds", spec, registry=registry)
        self.spec_draft_tokens = Counter(f"{PREFIX}_spec_draft_tokens_total", "Tokens drafted", spec, registry=registry)
        self.spec_accepted_tokens = Counter(
            f"{PREFIX}_spec_accepted_tokens_total",
            "Drafted tokens that verification kept",
            spec,
            registry=registry,
        )
        self.spec_forced_tokens = Counter(
            f"{PREFIX}_spec_forced_tokens_total",
            "Tokens that were the only legal continuation",
            spec,
            registry=registry,
        )
        self.draft_per_position = self._spec_by("draft", "position", registry)
        self.accepted_per_position = self._spec_by("accepted", "position", registry)
        self.draft_per_slot = self._spec_by("draft", "slot", registry)
        self.accepted_per_slot = self._spec_by("accepted", "slot", registry)
        self.target_passes = Counter(
            f"{PREFIX}_target_passes_total",
            "Forward passes of the target after prefill, per request taking part",
            ("strategy",),
            registry=registry,
        )
        self.spec_skipped_rounds = Counter(
            f"{PREFIX}_spec_skipped_rounds_total",
            "Rounds that drafted nothing: it would not pay, or nobody asked for it",
            ["strategy"],
            registry=registry,
        )
        self.target_passes_saved = Counter(
            f"{PREFIX}_target_passes_saved_total",
            "Passes that one token per pass would have taken in addition",
            ("strategy",),
            registry=registry,
        )
        self.batch_size = Histogram(
            f"{PREFIX}_batch_size",
            "Requests in one pass",
            ("phase",),
            buckets=_BATCH,
            registry=registry,
        )
        self.queue_requests = Gauge(f"{PREFIX}_queue_requests", "Requests waiting for a row", registry=registry)
        self.running_requests = Gauge(f"{PREFIX}_running_requests", "Requests being decoded", registry=registry)
        self.queue_oldest_age = Gauge(
            f"{PREFIX}_queue_oldest_age_seconds",
            "How long the request at the head of the queue has waited",
            registry=registry,
        )
        self.model_info = Gauge(
            f"{PREFIX}_model_info",
            "Always 1; the labels say which bundle is served",
            ("name", "model_version", "catalog_version"),
            registry=registry,
        )
        self.shadow_lists = Counter(
            f"{PREFIX}_shadow_lists_total",
            "Lists of the shadow sample by result: same, different (must stay 0), skipped, failed",
            ("result",),
            registry=registry,
        )
        # Present from the start: an increase from nothing to one is none to PromQL.
        for result in ("same", "different", "skipped", "failed"):
            self.shadow_lists.labels(result)
        self.gpu_memory = Gauge(
            f"{PREFIX}_gpu_memory_bytes",
            "Memory of the GPU: allocated by tensors, reserved by the process; absent on a CPU",
            ("kind",),
            registry=registry,
        )
        self.catalog_swaps = Counter(
            f"{PREFIX}_catalog_swaps_total",
            "New catalog versions taken up, refused for what they are, or not readable",
            ("result",),
            registry=registry,
        )
        self.items_out_of_stock = Gauge(
            f"{PREFIX}_items_out_of_stock", "Items of the served catalog that may not be recommended", registry=registry
        )
        self.warmup = Gauge(f"{PREFIX}_warmup_seconds", "From process start to ready", registry=registry)

    @staticmethod
    def _spec_by(what: str, label: str, registry: CollectorRegistry) -> Counter:
        return Counter(
            f"{PREFIX}_spec_{what}_tokens_per_{label}_total",
            f"Tokens {'drafted' if what == 'draft' else what} by {label}",
            ("strategy", label),
            registry=registry,
        )

    def set_model(self, name: str, model_version: str, catalog_version: str) -> None:
        self.model_info.clear()
        self.model_info.labels(name, model_version, catalog_version).set(1)


def new_registry() -> CollectorRegistry:
    """A registry of one application, with the process's memory, CPU and file descriptors."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """The text format Prometheus scrapes."""
    return generate_latest(registry)


def metric_names() -> set[str]:
    """The names of all our metrics: what dashboards, alerts and the README may use."""
    names: set[str] = set()
    for kind in (ApiMetrics, WorkerMetrics):
        registry = CollectorRegistry()
        kind(registry)
        names |= set(_names(registry))
    return names


def _names(registry: CollectorRegistry) -> Iterable[str]:
    for family in registry.collect():
        yield f"{family.name}_total" if family.type == "counter" else family.name
