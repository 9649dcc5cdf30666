"""The names other parts of the house rely on, in Prometheus's own terms."""

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import PREFIX, ApiMetrics, WorkerMetrics, exposition, metric_names, new_registry

PROMISED = [
    "requests_total",
    "request_duration_seconds",
    "stage_duration_seconds",
    "inflight_requests",
    "queue_requests",
    "running_requests",
    "queue_oldest_age_seconds",
    "admission_rejections_total",
    "batch_size",
    "acceptance_length",
    "spec_rounds_total",
    "spec_draft_tokens_total",
    "spec_accepted_tokens_total",
    "spec_forced_tokens_total",
    "spec_accepted_tokens_per_position_total",
    "spec_draft_tokens_per_position_total",
    "spec_accepted_tokens_per_slot_total",
    "spec_draft_tokens_per_slot_total",
    "target_passes_total",
    "target_passes_saved_total",
    "cache_operations_total",
    "redis_duration_seconds",
    "redis_errors_total",
    "catalog_items",
    "catalog_version_info",
    "unknown_items_total",
    "invalid_semantic_ids_total",
    "worker_up",
    "model_info",
    "build_info",
    "warmup_seconds",
    "gpu_memory_bytes",
]


def test_every_promised_metric_exists_under_its_name() -> None:
    assert {f"{PREFIX}_{name}" for name in PROMISED} <= metric_names()


def test_nothing_is_exported_that_is_not_known() -> None:
    assert metric_names() - {f"{PREFIX}_{name}" for name in PROMISED} == {
        "padrec_worker_retries_total",
        "padrec_shadow_lists_total",
        "padrec_trace_spans_total",
        "padrec_spec_skipped_rounds_total",
    }


def test_acceptance_length_has_a_bucket_per_value() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.acceptance_length.labels("list").observe(3)
    values = {
        sample.labels["le"]: sample.value
        for family in registry.collect()
        if family.name == "padrec_acceptance_length"
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
    assert (values["2.0"], values["3.0"], values["16.0"]) == (0, 1, 1)


def test_the_exposition_can_be_read_back_and_names_the_catalog_once() -> None:
    registry = new_registry()
    metrics = ApiMetrics(registry)
    metrics.set_catalog("aaa", 5)
    metrics.set_catalog("bbb", 7)
    families = {f.name: f for f in text_string_to_metric_families(exposition(registry).decode())}
    assert [s.labels for s in families["padrec_catalog_version_info"].samples] == [{"catalog_version": "bbb"}]
    assert families["padrec_catalog_items"].samples[0].value == 7
    assert "process_resident_memory_bytes" in families


def test_the_queue_is_three_gauges() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry).set_queue(running=3, waiting=2, oldest_wait_seconds=0.5)
    values = [registry.get_sample_value(f"padrec_{n}") for n in ("running_requests", "queue_requests")]
    assert values == [3, 2]
    assert registry.get_sample_value("padrec_queue_oldest_age_seconds") == 0.5
