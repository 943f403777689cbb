"""Every Prometheus metric of the service, declared once, with its unit and bucket range.

Knows names, labels and buckets; does not know gRPC, the engine, or who serves the page. Labels are bounded: methods, status
codes, reasons and worker numbers, never anything a client wrote.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from serving.observer import FINISH_REASONS

# 0.5 ms (one step of a small model) to 30 s (a long request under load).
LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROW_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

# What the engine and the service refuse requests for. Another reason is counted as "other", so that the label stays bounded.
REJECTION_REASONS = ("queue_full", "queue_tokens", "shutting_down", "loading")


@dataclass(frozen=True, slots=True)
class _MethodMetrics:
    """What is counted of one method, its labels looked up: that takes longer than counting."""

    in_flight: Gauge
    seconds: Histogram
    # By status code.
    answered: dict[str, Counter] = field(default_factory=dict)


class ServiceMetrics:
    """The metrics of one server; an ``EngineObserver`` for its engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare every metric in ``registry``."""
        ProcessCollector(registry=registry)

        self._requests = Counter(
            "onnxlate_requests", "Requests answered, by method and gRPC status code.", ("method", "code"), registry=registry
        )
        self._in_flight = Gauge("onnxlate_requests_in_flight", "Requests being answered.", ("method",), registry=registry)
        self._request_seconds = Histogram(
            "onnxlate_request_seconds",
            "From a request's arrival at its handler to its answer.",
            ("method",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._of_method: dict[str, _MethodMetrics] = {}
        rejections = Counter("onnxlate_rejections", "Requests refused before any work.", ("reason",), registry=registry)

        self._queue_length = Gauge("onnxlate_queue_length", "Sequences waiting for a row.", registry=registry)
        self._queue_seconds = Histogram(
            "onnxlate_queue_seconds",
            "From a sequence's arrival to the start of its encoder batch.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._first_token_seconds = Histogram(
            "onnxlate_time_to_first_token_seconds",
            "From a sequence's arrival to its first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._encode_seconds = Histogram(
            "onnxlate_encode_seconds", "One encoder batch.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self._sources_per_batch = Histogram(
            "onnxlate_sources_per_encoder_batch", "Sources encoded together.", buckets=ROW_BUCKETS, registry=registry
        )
        self._step_seconds = Histogram(
            "onnxlate_decode_step_seconds", "One decoder step of one lane.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self._rows_per_step = Histogram(
            "onnxlate_rows_per_step", "Rows that step together.", buckets=ROW_BUCKETS, registry=registry
        )
        self._source_tokens = Counter("onnxlate_source_tokens", "Source tokens encoded, padding not counted.", registry=registry)
        self._target_tokens = Counter(
            "onnxlate_target_tokens", "Target tokens of best hypotheses, and of scored targets.", registry=registry
        )
        finished = Counter("onnxlate_sequences_finished", "Sequences ended, by reason.", ("reason",), registry=registry)

        self._rows_in_use = Gauge("onnxlate_rows_in_use", "Cache rows held by sequences.", ("worker",), registry=registry)
        self._rows_capacity = Gauge("onnxlate_rows_capacity", "Cache rows there are.", ("worker",), registry=registry)
        self._cache_bytes = Gauge("onnxlate_cache_bytes", "Bytes allocated for caches.", ("worker",), registry=registry)

        self._model = Info("onnxlate_model", "The bundle that is served.", registry=registry)
        self._build = Info("onnxlate_build", "The program that serves it.", registry=registry)

        # Bound here, as those of methods are once they are called.
        self._finished = {reason: finished.labels(reason) for reason in (*FINISH_REASONS, "other")}
        self._rejections = {reason: rejections.labels(reason) for reason in (*REJECTION_REASONS, "other")}
        self._rows_in_use_of: dict[int, Gauge] = {}
        self._cache_bytes_of: dict[int, Gauge] = {}

    # Told by the interceptor.

    def request_started(self, method: str) -> None:
        """A request reached its handler. ``method`` is one of the service's own, never a name that a client made up."""
        self._method(method).in_flight.inc()

    def request_ended(self, method: str, code: str, seconds: float) -> None:
        """A request that started was answered with the gRPC status ``code``."""
        of_method = self._method(method)
        of_method.in_flight.dec()
        of_method.seconds.observe(seconds)
        answered = of_method.answered.get(code)
        if answered is None:
            answered = of_method.answered[code] = self._requests.labels(method, code)
        answered.inc()

    def _method(self, method: str) -> _MethodMetrics:
        found = self._of_method.get(method)
        if found is None:
            found = self._of_method[method] = _MethodMetrics(self._in_flight.labels(method), self._request_seconds.labels(method))
        return found

    def rejected(self, reason: str) -> None:
        """A request was refused before any work."""
        self._rejections.get(reason, self._rejections["other"]).inc()

    # Told by the server, once.

    def serves(self, *, name: str, version: str, precision: str, device: str, languages: str) -> None:
        """What is served."""
        self._model.info({"name": name, "version": version, "precision": precision, "device": device, "languages": languages})

    def built_from(self, *, version: str) -> None:
        """Which onnxlate serves it, on which Python."""
        self._build.info({"version": version, "python": platform.python_version()})

    def capacity(self, worker: int, rows: int) -> None:
        """Worker number ``worker`` has ``rows`` cache rows."""
        self._rows_capacity.labels(str(worker)).set(rows)

    # Told by the engine: the EngineObserver protocol.

    def queued(self, length: int) -> None:
        """See ``EngineObserver``."""
        self._queue_length.set(length)

    def encoded(self, seconds: float, sources: int, source_tokens: int) -> None:
        """See ``EngineObserver``."""
        self._encode_seconds.observe(seconds)
        self._sources_per_batch.observe(sources)
        self._source_tokens.inc(source_tokens)

    def stepped(self, seconds: float, rows: int) -> None:
        """See ``EngineObserver``."""
        self._step_seconds.observe(seconds)
        self._rows_per_step.observe(rows)

    def first_token(self, seconds_since_arrival: float) -> None:
        """See ``EngineObserver``."""
        self._first_token_seconds.observe(seconds_since_arrival)

    def finished(self, reason: str, target_tokens: int, queue_seconds: float) -> None:
        """See ``EngineObserver``."""
        self._finished.get(reason, self._finished["other"]).inc()
        self._target_tokens.inc(target_tokens)
        self._queue_seconds.observe(queue_seconds)

    def rows_in_use(self, worker: int, rows: int) -> None:
        """See ``EngineObserver``."""
        gauge = self._rows_in_use_of.get(worker)
        if gauge is None:
            gauge = self._rows_in_use_of[worker] = self._rows_in_use.labels(str(worker))
        gauge.set(rows)

    def cache_bytes(self, worker: int, bytes: int) -> None:
        """See ``EngineObserver``."""
        gauge = self._cache_bytes_of.get(worker)
        if gauge is None:
            gauge = self._cache_bytes_of[worker] = self._cache_bytes.labels(str(worker))
        gauge.set(bytes)
