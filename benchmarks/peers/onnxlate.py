"""onnxlate's engine, in process: no rpc and no text, as the others have none.

A batch is so many rows of each worker. All sources are submitted at once; the engine batches continuously.
"""

from __future__ import annotations

import gc
import math
import queue
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.peers.base import Job, PeerSpec, longest_first
from serving.bundle import read_bundle
from serving.config import EngineConfig
from serving.engine import Engine
from serving.observer import EngineObserver
from serving.request import DecodingOptions, Outcome
from serving.request import Sequence as EngineSequence

# Waiting that long for the next answer is a fault.
_PATIENCE_S = 600.0


class OnnxlatePeer:
    """A bundle and an engine on it; a batch of other rows takes another engine."""

    def __init__(self, spec: PeerSpec, observer: EngineObserver | None = None) -> None:
        self._spec = spec
        self._observer = observer
        self._bundle = read_bundle(spec.directory)
        self._config = engine_config(spec)
        self._engine = self._start()

    def _start(self) -> Engine:
        engine = Engine(self._bundle, self._config, self._observer)
        engine.start()
        return engine

    def prepare(self, job: Job) -> None:
        """An engine whose workers have the batch's rows; a source by itself takes as many as its beam in any engine."""
        rows = job.batch * job.beam_size
        if rows != self._config.max_rows_per_worker and not job.one_at_a_time:
            self._engine.close()
            # Or both would be in memory at once.
            del self._engine
            gc.collect()
            self._config = replace(
                self._config,
                max_rows_per_worker=rows,
                max_waiting_sequences=max(self._config.max_waiting_sequences, len(job.sources)),
                max_waiting_tokens=max(self._config.max_waiting_tokens, sum(map(len, job.sources))),
            )
            self._engine = self._start()

    def translate(self, sources: Sequence[tuple[int, ...]], job: Job) -> list[tuple[int, ...]]:
        """As ``Peer`` says.

        Raises:
            EngineError: a graph failed.
            TimeoutError: no more sources are answered.
        """
        options = DecodingOptions(
            beam_size=job.beam_size,
            min_target_tokens=job.min_target_tokens,
            max_target_tokens=job.max_target_tokens,
            # The rule by which CTranslate2 ends a beam search; any other takes more steps.
            early_stopping=True,
            # Nobody asks the others for scores either.
            return_scores=False,
        )
        outcomes: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()

        def sequence(place: int) -> EngineSequence:
            return EngineSequence(
                source_ids=sources[place],
                options=options,
                arrived_at_s=time.monotonic(),
                expires_at_s=math.inf,
                on_outcome=lambda outcome: outcomes.put((place, outcome)),
            )

        sequences = [sequence(place) for place in longest_first(sources)]
        self._engine.submit(sequences)
        found: dict[int, tuple[int, ...]] = {}
        try:
            for _ in sources:
                try:
                    place, outcome = outcomes.get(timeout=_PATIENCE_S)
                except queue.Empty:
                    raise TimeoutError(f"{len(found)} of {len(sources)} sources, and none in {_PATIENCE_S:g} s") from None
                if outcome.error is not None:
                    raise outcome.error
                found[place] = outcome.hypotheses[0].target_ids
        except BaseException:
            # Or the next job would be timed beside them.
            self._engine.cancel(sequences)
            raise
        return [found[place] for place in range(len(sources))]

    def describe(self) -> str:
        """The settings it runs with."""
        config = self._config
        alone = f", threads when alone={config.lone_threads}" if config.lone_threads > 1 else ""
        return f"workers={config.num_workers}{alone}, the batch's rows each, {self._spec.precision}"

    def close(self) -> None:
        """Stop the workers."""
        self._engine.close()


def engine_config(spec: PeerSpec) -> EngineConfig:
    """The engine's options for a split: its workers have one thread each, and one that is alone may have several.

    Raises:
        ValueError: several workers of several threads each; the engine has none.
    """
    split = spec.split
    if split.workers > 1 and split.threads > 1:
        raise ValueError(f"onnxlate has one thread for each of several workers, not {split}")
    alone = split.threads if split.threads_when_alone is None else split.threads_when_alone
    return EngineConfig(device=spec.device, threads=split.workers, threads_when_alone=alone)


def open_model(spec: PeerSpec) -> OnnxlatePeer:
    """Load a bundle."""
    return OnnxlatePeer(spec)
