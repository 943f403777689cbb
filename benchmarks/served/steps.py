"""What a worker does between two runs of the decoder graph: search, caches, scheduling and metrics, all of it Python.

CPU time of the worker's own thread from the end of one decoder call to the start of the next, in an engine with its metrics.
Where sources come or go, that holds the encoder and the writing of caches too; the median is of steps where none does. Knows the
engine and the function that runs a graph.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.offline import ordinary_ids
from benchmarks.peers import ONNXLATE
from benchmarks.peers.base import Job, PeerSpec, Split, perform
from benchmarks.peers.onnxlate import OnnxlatePeer
from benchmarks.sentences import random_sources
from benchmarks.served.instrumented import replaced_in
from serving.bundle import Bundle
from serving.metrics import ServiceMetrics
from serving.runtime import base

# The project's own limit for a step of ``ROWS`` rows.
PYTHON_US_TO_REACH = 100
ROWS = 32

# Tokens of every source and every target.
_LENGTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Medians of CPU time over all steps but the first."""

    rows: int
    beam_size: int
    steps: int
    python_us: float
    graph_ms: float

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, beam {self.beam_size}: {self.python_us:.0f} us of Python between two decoder calls of "
            f"{self.graph_ms:.1f} ms, medians of {self.steps} steps (at most {PYTHON_US_TO_REACH} us to reach)"
        )


@dataclass(slots=True)
class StepClock:
    """CPU seconds of one thread in decoder calls, and between them."""

    clock: Callable[[], float] = time.thread_time
    within_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    _ended_s: float = math.nan

    def timed(self, run: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        """``run`` with the clock around it."""

        def run_timed(graph: Any, binding: Any) -> None:
            started_s = self.clock()
            run(graph, binding)
            ended_s = self.clock()
            self.between_s.append(started_s - self._ended_s)
            self.within_s.append(ended_s - started_s)
            self._ended_s = ended_s

        return run_timed

    def cost(self, *, rows: int, beam_size: int) -> StepCost:
        """What has been seen.

        Raises:
            ValueError: fewer than two steps.
        """
        if len(self.between_s) < 2:
            raise ValueError("no two steps were run")
        return StepCost(
            rows=rows,
            beam_size=beam_size,
            steps=len(self.between_s) - 1,
            python_us=1e6 * statistics.median(self.between_s[1:]),
            graph_ms=1e3 * statistics.median(self.within_s[1:]),
        )


def measure_step(bundle: Bundle, *, beam_size: int, rows: int = ROWS, rounds: int = 8) -> StepCost:
    """Let one worker of one thread decode ``rounds`` times as many sources as it has room for, all of one length.

    Raises:
        ValueError: the beam is wider than the rows.
        EngineError: a graph failed.
        TimeoutError: no more sources are answered.
    """
    if rows < beam_size:
        raise ValueError(f"a beam of {beam_size} takes more than {rows} rows")
    batch = rows // beam_size
    job = Job(
        sources=random_sources(batch * rounds, _LENGTH, ordinary_ids(bundle), bundle.manifest.ids.eos),
        batch=batch,
        beam_size=beam_size,
        min_target_tokens=_LENGTH,
        max_target_tokens=_LENGTH,
    )
    spec = PeerSpec(
        peer=ONNXLATE, directory=bundle.directory, precision=bundle.manifest.precision, split=Split(workers=1, threads=1)
    )
    clock = StepClock()
    with replaced_in(base, "run_graph", clock.timed):
        peer = OnnxlatePeer(spec, ServiceMetrics(CollectorRegistry()))
        try:
            perform(peer, job)
        finally:
            peer.close()
    return clock.cost(rows=batch * beam_size, beam_size=beam_size)
