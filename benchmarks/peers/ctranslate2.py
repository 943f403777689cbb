"""CTranslate2, through ``Translator.translate_batch``.

It sorts the sources by length, cuts them into batches by itself and has as many in flight as it has workers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import ctranslate2

from benchmarks.peers.base import Job, PeerSpec

_COMPUTE_TYPES = {"fp32": "float32", "int8": "int8", "fp16": "float16"}


class CTranslate2Peer:
    """A converted model."""

    def __init__(self, spec: PeerSpec) -> None:
        # In the order of the ids; padding, the last one, is left out by the converter.
        self._pieces: list[str] = json.loads((spec.directory / "shared_vocabulary.json").read_text())
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self._translator = ctranslate2.Translator(
            str(spec.directory),
            device=spec.device,
            compute_type=_COMPUTE_TYPES[spec.precision],
            inter_threads=spec.split.workers,
            intra_threads=spec.split.threads,
        )
        self._spec = spec

    def prepare(self, job: Job) -> None:
        """There is nothing to prepare."""

    def translate(self, sources: Sequence[tuple[int, ...]], job: Job) -> list[tuple[int, ...]]:
        """As ``Peer`` says."""
        results = self._translator.translate_batch(
            [[self._pieces[i] for i in source] for source in sources],
            max_batch_size=job.batch,
            batch_type="examples",
            beam_size=job.beam_size,
            min_decoding_length=job.min_target_tokens,
            max_decoding_length=job.max_target_tokens,
        )
        return [tuple(self._ids[piece] for piece in result.hypotheses[0]) for result in results]

    def describe(self) -> str:
        """The settings it runs with."""
        variables = "".join(f", {name}={value}" for name, value in self._spec.environment.items())
        return f"inter_threads={self._spec.split.workers}, intra_threads={self._spec.split.threads}, " + (
            f"compute_type={self._translator.compute_type}{variables}"
        )

    def close(self) -> None:
        """Unload the model."""
        self._translator.unload_model()


def open_model(spec: PeerSpec) -> CTranslate2Peer:
    """Load a converted model."""
    return CTranslate2Peer(spec)
