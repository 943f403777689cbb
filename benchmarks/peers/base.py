"""What every peer is asked and what it answers, and how an answer is timed.

Knows ids, times and memory of its own process; does not know any library.
"""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.results import Precision


@dataclass(frozen=True, slots=True)
class Split:
    """How a peer uses the CPUs: batches in flight, and threads that work on each."""

    workers: int
    threads: int
    # Threads that a worker uses while no other has anything to do; as many as ever where it is left out. onnxlate's alone.
    threads_when_alone: int | None = None

    def __str__(self) -> str:
        alone = "" if self.threads_when_alone is None else f", {self.threads_when_alone} alone"
        return f"{self.workers} x {self.threads}{alone}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSpec:
    """A peer to open: one library, one model, one precision, one split."""

    # A key of ``benchmarks.peers.PEERS``.
    peer: str
    # Where this library finds the model.
    directory: Path
    precision: Precision
    split: Split
    device: str = "cpu"
    # Environment variables that it needs before it is loaded.
    environment: Mapping[str, str] = field(default_factory=dict)
    # What those choose, as a report names it; empty where they choose nothing.
    kernels: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Sources to translate with one setting."""

    # With the end-of-sentence token.
    sources: Sequence[tuple[int, ...]]
    # Sources of one batch; each worker has one in flight.
    batch: int
    beam_size: int = 1
    # Every target gets at least so many tokens; as many as max_target_tokens: the length is forced.
    min_target_tokens: int = 0
    max_target_tokens: int = 128
    # Each source is sent when the one before it is answered, and timed by itself.
    one_at_a_time: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a job."""

    # Best hypothesis of every source, in their order, without start and end-of-sentence tokens.
    targets: tuple[tuple[int, ...], ...]
    # Tokens decoded, end-of-sentence tokens included.
    target_tokens: int
    seconds: float
    # Of the whole process, all threads, user and system.
    cpu_seconds: float
    # Of each source, when they were sent one at a time.
    latencies_s: tuple[float, ...]
    # Resident memory after the job, and its peak since the process started.
    rss_bytes: int
    peak_rss_bytes: int


class Peer(Protocol):
    """A loaded model."""

    def prepare(self, job: Job) -> None:
        """Whatever a job needs before its first source, which is not timed."""

    def translate(self, sources: Sequence[tuple[int, ...]], job: Job) -> list[tuple[int, ...]]:
        """The best hypothesis of every source, in their order, without start and end-of-sentence tokens."""

    def describe(self) -> str:
        """The settings it runs with, in one line."""

    def close(self) -> None:
        """Stop its threads."""


def perform(peer: Peer, job: Job) -> Answer:
    """Do a job and time it."""
    peer.prepare(job)
    latencies: list[float] = []
    targets: list[tuple[int, ...]] = []
    cpu_started, started = _cpu_seconds(), time.perf_counter()
    if job.one_at_a_time:
        for source in job.sources:
            sent = time.perf_counter()
            targets += peer.translate([source], job)
            latencies.append(time.perf_counter() - sent)
    else:
        targets = peer.translate(job.sources, job)
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - cpu_started
    rss_bytes, peak_rss_bytes = resident_bytes()
    return Answer(
        targets=tuple(targets),
        target_tokens=count_tokens(targets, job.max_target_tokens),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        latencies_s=tuple(latencies),
        rss_bytes=rss_bytes,
        peak_rss_bytes=peak_rss_bytes,
    )


def count_tokens(targets: Sequence[tuple[int, ...]], max_target_tokens: int) -> int:
    """Tokens decoded: a target that does not reach the limit ended with an end-of-sentence token."""
    return sum(min(len(target) + 1, max_target_tokens) for target in targets)


def resident_bytes(status: Path = Path("/proc/self/status")) -> tuple[int, int]:
    """Resident memory of this process: now, and at its peak.

    Raises:
        OSError: the system has no such file (it is Linux's).
    """
    kib = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status.read_text(), re.MULTILINE))
    return int(kib["VmRSS"]) * 1024, int(kib["VmHWM"]) * 1024


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def longest_first(sources: Sequence[tuple[int, ...]]) -> list[int]:
    """Places of the sources, the longest one's first, equals in their order."""
    return sorted(range(len(sources)), key=lambda i: -len(sources[i]))
