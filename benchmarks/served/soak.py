"""Many requests in one go, and whether memory grows with them.

Knows the generator's process, a server's request counter and its memory.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.served.generator import ClosedLoad, Plan, generate_apart
from benchmarks.served.point import Corpus
from benchmarks.served.processes import usage
from benchmarks.served.servers import Server

REQUESTS = 50_000
CLIENTS = 64
_LONGEST_S = 3600.0
# Of the requests: while caches and memory pools fill, growth says nothing.
_SETTLING = 0.2


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory after so many requests."""

    requests: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What became of it."""

    server: str
    requests: int
    seconds: float
    errors: dict[str, int]
    samples: tuple[MemorySample, ...]
    # Of the straight line through the samples after the settling; None with fewer than two.
    bytes_per_1000_requests: float | None

    def __str__(self) -> str:
        first, last = self.samples[0].memory_bytes, self.samples[-1].memory_bytes
        highest = max(sample.memory_bytes for sample in self.samples)
        slope = self.bytes_per_1000_requests
        return (
            f"{self.server}: {self.requests} requests in {self.seconds:.0f} s, errors {self.errors or 'none'}; "
            f"memory {first / 2**20:.1f} MiB at the start, {last / 2**20:.1f} at the end, {highest / 2**20:.1f} at most, "
            + ("too few samples for a slope" if slope is None else f"{slope / 1024:+.1f} KiB per 1000 requests once settled")
        )


def slope_after_settling(samples: Sequence[MemorySample]) -> float | None:
    """Bytes per 1000 requests, by least squares over the samples after the first fifth of the requests.

    None with fewer than two of them.
    """
    if not samples:
        return None
    from_requests = samples[0].requests + _SETTLING * (samples[-1].requests - samples[0].requests)
    settled = [sample for sample in samples if sample.requests >= from_requests]
    if len({sample.requests for sample in settled}) < 2:
        return None
    fitted = statistics.linear_regression([s.requests for s in settled], [float(s.memory_bytes) for s in settled])
    return 1000 * fitted.slope


def soak(
    server: Server,
    corpus: Corpus,
    *,
    requests: int = REQUESTS,
    clients: int = CLIENTS,
    every_s: float = 1.0,
    say: Callable[[str], None],
) -> Soak:
    """Send ``requests`` requests in a closed loop to a started server, reading its memory every ``every_s`` seconds."""
    load = ClosedLoad(clients=clients, max_requests=requests)
    plan = Plan(wire=server.wire, target=server.target, texts=corpus.texts, load=load, warmup_s=0.0, duration_s=_LONGEST_S)
    samples = [_sample(server)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate_apart, plan)
        while True:
            try:
                trace = running.result(timeout=every_s)
                break
            except TimeoutError:
                samples.append(_sample(server))
                if len(samples) % 30 == 0:
                    say(f"{samples[-1].requests:.0f} requests, {samples[-1].memory_bytes / 2**20:.1f} MiB")
    samples.append(_sample(server))
    return Soak(
        server=server.name,
        requests=len(trace.samples),
        seconds=trace.elapsed_s,
        errors=dict(Counter(sample.error for sample in trace.samples if sample.error is not None)),
        samples=tuple(samples),
        bytes_per_1000_requests=slope_after_settling(samples),
    )


def _sample(server: Server) -> MemorySample:
    return MemorySample(server.counters().requests, usage(server.pid).memory_bytes)
