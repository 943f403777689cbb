"""``onnxlate`` with a clock around its graphs: ``python -m benchmarks.served.instrumented serve BUNDLE ...``.

Adds to the metrics page the CPU time inside the graphs, and that of each kind of thread. Knows two places of the server: the
function that runs a graph, and the one that starts the metrics page. With one thread a graph runs on the thread that calls it, so
that thread's clock has all of it; it takes ``--threads-when-alone 1`` to keep it so.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from benchmarks.served.processes import cpu_seconds
from serving import cli, server
from serving.runtime import base, device, host

GRAPHS = "bench_graphs_cpu_seconds"
THREADS = "bench_threads_cpu_seconds"
EVENT_LOOP, WORKERS, OTHER_PYTHON, NATIVE = "event loop", "workers", "other Python", "gRPC core"

_TASKS = Path("/proc/self/task")


class GraphClock(Collector):
    """CPU time inside graphs, summed over threads."""

    def __init__(self, tasks: Path = _TASKS) -> None:
        # By thread, so that each writes its own.
        self._seconds: dict[int, float] = {}
        self._tasks = tasks

    def timed(self, run: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        """``run`` with the clock around it."""

        def run_timed(graph: Any, binding: Any) -> None:
            started_s = time.thread_time()
            try:
                run(graph, binding)
            finally:
                thread = threading.get_ident()
                self._seconds[thread] = self._seconds.get(thread, 0.0) + time.thread_time() - started_s

        return run_timed

    @property
    def seconds(self) -> float:
        """By now, of all threads."""
        return sum(list(self._seconds.values()))

    def collect(self) -> Iterator[Metric]:
        """What the page shows."""
        yield CounterMetricFamily(GRAPHS, "CPU time inside graphs.", value=self.seconds)
        threads = CounterMetricFamily(THREADS, "CPU time of living threads, by kind.", labels=["kind"])
        for kind, seconds in thread_seconds(self._tasks).items():
            threads.add_metric([kind], seconds)
        yield threads


def thread_seconds(tasks: Path = _TASKS) -> Mapping[str, float]:
    """CPU time of this process's living threads, by kind."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    seconds: defaultdict[str, float] = defaultdict(float)
    for task in tasks.iterdir():
        try:
            seconds[kind_of(names.get(int(task.name)))] += cpu_seconds(task)
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return seconds


def kind_of(name: str | None) -> str:
    """The kind of a thread by its name; None is a thread that Python did not start."""
    if name is None:
        return NATIVE
    if name == "MainThread":
        return EVENT_LOOP
    return WORKERS if name.startswith("onnxlate-worker") else OTHER_PYTHON


def main() -> None:
    """Put the clock in, then run the command."""
    clock = GraphClock()
    for module in (base, device, host):
        replace_in(module, "run_graph", clock.timed)

    def with_clock(start_page: Callable[..., Any]) -> Callable[..., Any]:
        def start_page_with_clock(port: int, host: str, registry: CollectorRegistry) -> Any:
            registry.register(clock)
            return start_page(port, host, registry)

        return start_page_with_clock

    replace_in(server, "start_http_server", with_clock)
    cli.main()


def replace_in(module: ModuleType, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrap`` around a module's function.

    Raises:
        AttributeError: the module has no such function any more; then this program has to follow it.
    """
    setattr(module, name, wrap(getattr(module, name)))


@contextmanager
def replaced_in(module: ModuleType, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """``replace_in`` until the block is left."""
    before = getattr(module, name)
    replace_in(module, name, wrap)
    try:
        yield
    finally:
        setattr(module, name, before)


if __name__ == "__main__":
    main()
