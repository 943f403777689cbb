from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.served import instrumented
from benchmarks.served.instrumented import EVENT_LOOP, NATIVE, OTHER_PYTHON, WORKERS, GraphClock, kind_of, thread_seconds
from benchmarks.served.point import Corpus, Times
from benchmarks.served.shell import Spent, cost, measure_shell, read_spent
from serving.bundle import Bundle


def busy(seconds: float) -> None:
    ends_s = time.thread_time() + seconds
    while time.thread_time() < ends_s:
        pass


def test_the_clock_adds_up_cpu_time_of_every_thread() -> None:
    clock = GraphClock()
    ran: list[tuple[Any, Any]] = []

    def run(graph: Any, binding: Any) -> None:
        ran.append((graph, binding))
        busy(binding)

    timed = clock.timed(run)
    timed("graph", 0.01)
    other = threading.Thread(target=timed, args=("graph", 0.02))
    other.start()
    other.join()
    assert ran == [("graph", 0.01), ("graph", 0.02)]
    assert clock.seconds >= 0.03


def test_the_clock_counts_a_graph_that_fails() -> None:
    clock = GraphClock()

    def run(graph: Any, binding: Any) -> None:
        busy(0.01)
        raise ValueError("a graph failed")

    with pytest.raises(ValueError, match="a graph failed"):
        clock.timed(run)(None, None)
    assert clock.seconds >= 0.01


def test_the_page_tells_what_was_spent() -> None:
    registry = CollectorRegistry()
    clock = GraphClock()
    registry.register(clock)
    clock.timed(lambda graph, binding: busy(0.02))(None, None)
    spent = read_spent(generate_latest(registry).decode(), 7.0)
    assert spent.total_s == 7.0
    assert spent.graphs_s == pytest.approx(clock.seconds)
    assert spent.threads_s[EVENT_LOOP] > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MainThread", EVENT_LOOP),
        ("onnxlate-worker-1", WORKERS),
        ("asyncio_0", OTHER_PYTHON),
        (None, NATIVE),
    ],
)
def test_kinds_of_threads(name: str | None, kind: str) -> None:
    assert kind_of(name) == kind


def test_threads_of_this_process() -> None:
    assert EVENT_LOOP in thread_seconds()


def test_the_cost_of_a_sentence() -> None:
    before = Spent(10.0, 4.0, {EVENT_LOOP: 1.0, WORKERS: 5.0})
    after = Spent(18.0, 10.0, {EVENT_LOOP: 2.0, WORKERS: 11.5, NATIVE: 0.5})
    found = cost(before, after, sentences=1000, clients=8, beam_size=1)
    assert (found.total_ms, found.graphs_ms) == pytest.approx((8.0, 6.0))
    assert found.shell_ms == pytest.approx(2.0)
    assert list(found.parts_ms.values()) == pytest.approx([1.0, 0.5, 0.5])
    assert str(found) == (
        "8 clients, beam 1: 2.00 ms of CPU a sentence outside graphs (event loop (gRPC, tokenization, metrics) 1.00, workers "
        "outside graphs (scheduling, search, copies) 0.50, gRPC's own threads 0.50), 6.00 ms inside; 1000 sentences"
    )


def test_no_cost_without_sentences() -> None:
    with pytest.raises(ValueError, match="no sentence was translated"):
        cost(Spent(0, 0, {}), Spent(1, 1, {}), sentences=0, clients=1, beam_size=1)


def test_a_function_that_is_no_longer_there_is_missed() -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        instrumented.replace_in(instrumented, "no_such_function", lambda function: function)


@pytest.mark.slow
def test_the_shell_of_a_real_server(tiny_bundle: Bundle) -> None:
    times = Times(warmup_s=0.0, duration_s=0.5)
    (found,) = measure_shell(tiny_bundle.directory, Corpus(texts=("a man", "a dog")), times, clients=(4,), threads=1)
    assert found.sentences > 0
    assert 0 < found.graphs_ms < found.total_ms
    assert len(found.parts_ms) >= 3
