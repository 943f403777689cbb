"""The shell's cost: CPU time a sentence outside the model's graphs (gRPC, tokenization, scheduling, search, metrics).

All CPU time of the server's process under load, less that inside graphs. Knows the instrumented server's metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.served.generator import ClosedLoad, Plan, generate_apart
from benchmarks.served.instrumented import EVENT_LOOP, GRAPHS, NATIVE, OTHER_PYTHON, THREADS, WORKERS
from benchmarks.served.point import Corpus, Times
from benchmarks.served.processes import usage
from benchmarks.served.servers import Knobs, OnnxlateServer, Server

# Of CPU time a sentence.
SHELL_MS_TO_REACH = 0.6

_MODULE = "benchmarks.served.instrumented"
# What a kind of thread does outside graphs.
_WORK = {
    EVENT_LOOP: "event loop (gRPC, tokenization, metrics)",
    WORKERS: "workers outside graphs (scheduling, search, copies)",
    NATIVE: "gRPC's own threads",
    OTHER_PYTHON: "other Python threads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShellCost:
    """CPU time a sentence, in milliseconds."""

    clients: int
    beam_size: int
    sentences: int
    total_ms: float
    graphs_ms: float
    # Of the shell, by what it is spent on; rounding to clock ticks aside, they sum up to it.
    parts_ms: Mapping[str, float]

    @property
    def shell_ms(self) -> float:
        """Everything outside graphs."""
        return self.total_ms - self.graphs_ms

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {ms:.2f}" for what, ms in self.parts_ms.items())
        return (
            f"{self.clients} clients, beam {self.beam_size}: {self.shell_ms:.2f} ms of CPU a sentence outside graphs ({parts}), "
            f"{self.graphs_ms:.2f} ms inside; {self.sentences} sentences"
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds by now."""

    total_s: float
    graphs_s: float
    # By kind of thread.
    threads_s: Mapping[str, float]


def read_spent(page: str, total_s: float) -> Spent:
    """From the instrumented server's metrics page, and the account of its process."""
    graphs_s, threads_s = 0.0, {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == f"{GRAPHS}_total":
                graphs_s = sample.value
            elif sample.name == f"{THREADS}_total":
                threads_s[sample.labels["kind"]] = sample.value
    return Spent(total_s, graphs_s, threads_s)


def cost(before: Spent, after: Spent, *, sentences: int, clients: int, beam_size: int) -> ShellCost:
    """What was spent between two readings.

    Raises:
        ValueError: nothing was translated between them.
    """
    if not sentences:
        raise ValueError("no sentence was translated")
    scale = 1e3 / sentences
    graphs_ms = (after.graphs_s - before.graphs_s) * scale
    threads_ms = {kind: (seconds - before.threads_s.get(kind, 0.0)) * scale for kind, seconds in after.threads_s.items()}
    if WORKERS in threads_ms:
        threads_ms[WORKERS] -= graphs_ms
    return ShellCost(
        clients=clients,
        beam_size=beam_size,
        sentences=sentences,
        total_ms=(after.total_s - before.total_s) * scale,
        graphs_ms=graphs_ms,
        parts_ms={work: threads_ms[kind] for kind, work in _WORK.items() if kind in threads_ms},
    )


def measure_shell(
    bundle: Path, corpus: Corpus, times: Times, *, clients: tuple[int, ...], threads: int, beam_size: int = 1
) -> list[ShellCost]:
    """Serve a bundle with the clock in, load it in a closed loop of so many clients each, and say what a sentence costs.

    Raises:
        ServerUnavailableError: the server does not start.
    """
    # The clock is that of the thread which calls a graph: one on several threads would be taken for something else.
    server = OnnxlateServer(bundle, Knobs(batch=64 * beam_size), threads=threads, threads_when_alone=1, module=_MODULE)
    with server:
        # The first requests pay for cold memory.
        _load(server, corpus, Times(warmup_s=0.0, duration_s=1.0), clients[0], beam_size)
        return [_measure_one(server, corpus, times, number, beam_size) for number in clients]


def _measure_one(server: Server, corpus: Corpus, times: Times, clients: int, beam_size: int) -> ShellCost:
    before = _spent(server)
    sentences = _load(server, corpus, times, clients, beam_size)
    return cost(before, _spent(server), sentences=sentences, clients=clients, beam_size=beam_size)


def _spent(server: Server) -> Spent:
    return read_spent(server.metrics_page(), usage(server.pid).cpu_s)


def _load(server: Server, corpus: Corpus, times: Times, clients: int, beam_size: int) -> int:
    plan = Plan(
        wire=server.wire,
        target=server.target,
        texts=corpus.texts,
        load=ClosedLoad(clients=clients),
        beam_size=beam_size,
        warmup_s=times.warmup_s,
        duration_s=times.duration_s,
        drain_s=times.drain_s,
    )
    return sum(sample.answer is not None for sample in generate_apart(plan).samples)
