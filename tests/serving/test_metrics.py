from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from serving.metrics import LATENCY_BUCKETS_S, REJECTION_REASONS, ROW_BUCKETS, ServiceMetrics
from serving.observer import FINISH_REASONS, EngineObserver, NullObserver


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> ServiceMetrics:
    return ServiceMetrics(registry)


def test_a_request_is_in_flight_until_it_is_answered(metrics: ServiceMetrics, registry: CollectorRegistry) -> None:
    metrics.request_started("Translate")
    assert registry.get_sample_value("onnxlate_requests_in_flight", {"method": "Translate"}) == 1
    metrics.request_ended("Translate", "INVALID_ARGUMENT", 0.25)
    assert registry.get_sample_value("onnxlate_requests_in_flight", {"method": "Translate"}) == 0
    labels = {"method": "Translate", "code": "INVALID_ARGUMENT"}
    assert registry.get_sample_value("onnxlate_requests_total", labels) == 1
    assert registry.get_sample_value("onnxlate_request_seconds_sum", {"method": "Translate"}) == 0.25


def test_what_the_engine_tells_is_counted(metrics: ServiceMetrics, registry: CollectorRegistry) -> None:
    observer: EngineObserver = metrics
    observer.queued(5)
    observer.encoded(0.02, 3, 40)
    observer.stepped(0.004, 7)
    observer.first_token(0.125)
    observer.finished("eos", 11, 0.5)
    observer.rows_in_use(1, 6)
    observer.rows_in_use(1, 4)
    observer.cache_bytes(0, 4096)
    observer.cache_bytes(0, 8192)
    metrics.capacity(1, 64)
    expected = {
        "onnxlate_queue_length": 5,
        "onnxlate_encode_seconds_sum": 0.02,
        "onnxlate_sources_per_encoder_batch_sum": 3,
        "onnxlate_source_tokens_total": 40,
        "onnxlate_decode_step_seconds_sum": 0.004,
        "onnxlate_rows_per_step_sum": 7,
        "onnxlate_time_to_first_token_seconds_sum": 0.125,
        "onnxlate_target_tokens_total": 11,
        "onnxlate_queue_seconds_sum": 0.5,
    }
    assert {name: registry.get_sample_value(name) for name in expected} == expected
    assert registry.get_sample_value("onnxlate_rows_in_use", {"worker": "1"}) == 4
    assert registry.get_sample_value("onnxlate_rows_capacity", {"worker": "1"}) == 64
    assert registry.get_sample_value("onnxlate_cache_bytes", {"worker": "0"}) == 8192


@pytest.mark.parametrize("reason", FINISH_REASONS)
def test_finish_reasons_are_told_apart(metrics: ServiceMetrics, registry: CollectorRegistry, reason: str) -> None:
    metrics.finished(reason, 1, 0.0)
    counts = {r: registry.get_sample_value("onnxlate_sequences_finished_total", {"reason": r}) for r in FINISH_REASONS}
    assert counts == {r: float(r == reason) for r in FINISH_REASONS}


@pytest.mark.parametrize("reason", REJECTION_REASONS)
def test_rejections_are_told_apart(metrics: ServiceMetrics, registry: CollectorRegistry, reason: str) -> None:
    metrics.rejected(reason)
    counts = {r: registry.get_sample_value("onnxlate_rejections_total", {"reason": r}) for r in REJECTION_REASONS}
    assert counts == {r: float(r == reason) for r in REJECTION_REASONS}


def test_reasons_nobody_foresaw_share_one_label(metrics: ServiceMetrics, registry: CollectorRegistry) -> None:
    metrics.rejected("moon")
    metrics.rejected("tide")
    metrics.finished("moon", 0, 0.0)
    assert registry.get_sample_value("onnxlate_rejections_total", {"reason": "other"}) == 2
    assert registry.get_sample_value("onnxlate_sequences_finished_total", {"reason": "other"}) == 1
    assert registry.get_sample_value("onnxlate_rejections_total", {"reason": "moon"}) is None


def test_what_is_served_and_built_is_told(metrics: ServiceMetrics, registry: CollectorRegistry) -> None:
    model = {"name": "m", "version": "v", "precision": "int8", "device": "cpu", "languages": "en-de"}
    metrics.serves(name="m", version="v", precision="int8", device="cpu", languages="en-de")
    metrics.built_from(version="9.9")
    assert registry.get_sample_value("onnxlate_model_info", model) == 1
    (build,) = [family for family in registry.collect() if family.name == "onnxlate_build"]
    assert build.samples[0].labels["version"] == "9.9"


def test_buckets_span_half_a_millisecond_to_thirty_seconds_and_one_row_to_512() -> None:
    assert (LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[-1]) == (0.0005, 30.0)
    assert (ROW_BUCKETS[0], ROW_BUCKETS[-1]) == (1, 512)
    assert list(LATENCY_BUCKETS_S) == sorted(LATENCY_BUCKETS_S)


def test_the_process_itself_is_measured(metrics: ServiceMetrics, registry: CollectorRegistry) -> None:
    assert registry.get_sample_value("process_resident_memory_bytes") is not None


def test_two_servers_of_one_process_do_not_share_metrics() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    ServiceMetrics(first).rejected("loading")
    ServiceMetrics(second)
    assert second.get_sample_value("onnxlate_rejections_total", {"reason": "loading"}) == 0


def test_the_null_observer_takes_everything() -> None:
    observer: EngineObserver = NullObserver()
    observer.queued(1)
    observer.encoded(1.0, 1, 1)
    observer.stepped(1.0, 1)
    observer.first_token(1.0)
    observer.finished("eos", 1, 1.0)
    observer.rows_in_use(0, 1)
    observer.cache_bytes(0, 1)
