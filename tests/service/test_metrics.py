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
    "worker_restarts_total",
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
        "padrec_worker_ejections_total",
        "padrec_catalog_swaps_total",
        "padrec_items_out_of_stock",
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


def test_one_model_is_named_at_a_time() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.set_model("m", "1", "aaa")
    metrics.set_model("m", "1", "bbb")
    labels = {"name": "m", "model_version": "1"}
    assert registry.get_sample_value("padrec_model_info", labels | {"catalog_version": "aaa"}) is None
    assert registry.get_sample_value("padrec_model_info", labels | {"catalog_version": "bbb"}) == 1
