"""What is compared with the peers: a checkpoint, its bundles, real sentences, and what our engine makes of them."""

from __future__ import annotations

import math
import queue
import time
from dataclasses import dataclass, field
from pathlib import Path

from export.checkpoint import Checkpoint, read_checkpoint
from export.pipeline import export_bundle
from serving.bundle import Bundle
from serving.config import EngineConfig
from serving.engine import Engine
from serving.manifest import Int8Scales, Precision
from serving.request import DecodingOptions, Hypothesis, Outcome, Sequence
from serving.tokenizers import load_tokenizer
from tests.support import ENGLISH_LINES

# Waiting that long for one setting of all sentences is a failure.
_PATIENCE_S = 300.0


@dataclass
class Subject:
    """One checkpoint and what belongs to it; bundles are exported when they are first asked for."""

    directory: Path
    work: Path
    # Of its bundle in int8; None is the default of export.
    int8_scales: Int8Scales | None = None
    checkpoint: Checkpoint = field(init=False)
    _bundles: dict[Precision, Bundle] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoint = read_checkpoint(self.directory)

    def bundle(self, precision: Precision) -> Bundle:
        """The checkpoint's bundle in this precision."""
        if precision not in self._bundles:
            scales = self.int8_scales if precision == "int8" else None
            made = export_bundle(
                self.directory, self.work / precision, precision=precision, int8_scales=scales, show_progress=False
            )
            self._bundles[precision] = made
        return self._bundles[precision]

    def sources(self) -> list[tuple[int, ...]]:
        """Ids, with the end-of-sentence token, of single sentences and of two or three in a row; shortest first."""
        single = list(dict.fromkeys((*ENGLISH_LINES, *self.checkpoint.sample_lines)))
        double = [" ".join(single[i : i + 2]) for i in range(0, 30, 2)]
        triple = [" ".join(single[i : i + 3]) for i in range(0, 15, 3)]
        tokenizer = load_tokenizer(self.bundle("fp32"))
        longest = self.checkpoint.config.max_positions - 1
        ids = [tokenizer.encode(line)[:longest] for line in (*single, *double, *triple)]
        return sorted(((*one, self.checkpoint.config.eos_id) for one in ids), key=len)

    def decode(
        self, sources: list[tuple[int, ...]], options: DecodingOptions, precision: Precision = "fp32"
    ) -> list[tuple[Hypothesis, ...]]:
        """Hypotheses of every source, best first, as our engine serves them."""
        return [outcome.hypotheses for outcome in self.outcomes([(source, options) for source in sources], precision)]

    def outcomes(self, asked: list[tuple[tuple[int, ...], DecodingOptions]], precision: Precision = "fp32") -> list[Outcome]:
        """What comes of sources, each with its own options, that are decoded together."""
        outcomes: queue.Queue[tuple[int, Outcome]] = queue.Queue()

        def sequence(index: int, source_ids: tuple[int, ...], options: DecodingOptions) -> Sequence:
            return Sequence(
                source_ids=source_ids,
                options=options,
                arrived_at_s=time.monotonic(),
                expires_at_s=math.inf,
                on_outcome=lambda outcome: outcomes.put((index, outcome)),
            )

        engine = Engine(self.bundle(precision), EngineConfig(threads=2))
        engine.start()
        try:
            engine.submit([sequence(i, *one) for i, one in enumerate(asked)])
            found = dict(outcomes.get(timeout=_PATIENCE_S) for _ in asked)
        finally:
            engine.close()
        for outcome in found.values():
            if outcome.error is not None:
                raise outcome.error
        return [found[i] for i in range(len(asked))]
