"""The graphs on the CPU, over arrays in host memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.kv_cache import EncodedSource, LaneCache, RowCache
from serving.manifest import LONE_DECODER_NAME
from serving.runtime.base import LaneDecoder, ModelSession
from serving.runtime.graphs import load_graphs, run_graph

# A worker that is not alone any more keeps copies of sources for so many rows, since it may soon be alone again.
_MOST_ROWS_KEPT = 32


@dataclass(frozen=True, slots=True)
class _Graphs:
    """Both graphs with one number of threads."""

    encoder: ort.InferenceSession
    decoder: ort.InferenceSession


class HostModelSession(ModelSession):
    """The graphs on the CPU: for many workers at once, and on more threads for one that is alone.

    The decoder of a worker that is alone knows rows, each with its own copy of its source, instead of sources of several
    hypotheses. That takes no branch for the width in each layer, which is a tenth of a lone row's step; and it reads each source
    once for each of its rows, which is the slower way for 32 sources of 4 on two workers at once.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1, lone_threads: int = 1) -> None:
        """Load the graphs; see ``open_session``, which checks first that there are kernels for them.

        Raises:
            BundleError: a graph that cannot be loaded, or is not of this format.
        """

        def load(decoder: Path, threads: int) -> _Graphs:
            return _Graphs(*load_graphs(bundle, (bundle.encoder_path, decoder), device="cpu", threads=threads))

        self._shared = self._lone = load(bundle.decoder_path, threads)
        # A bundle of an older version has one decoder.
        self._lone_by_row = lone_threads > threads and bundle.lone_decoder_path is not None
        if lone_threads > threads:
            self._lone = load(bundle.lone_decoder_path or bundle.decoder_path, lone_threads)
            if _interface(self._lone.decoder) != _interface(self._shared.decoder):
                raise BundleError(
                    bundle.directory, [f"{LONE_DECODER_NAME}: has other inputs or outputs than {bundle.decoder_path.name}"]
                )
        super().__init__(bundle, self._shared.decoder)

    def encode(
        self, source_ids: NDArray[np.int64], source_lengths: NDArray[np.int32], *, alone: bool = False
    ) -> Sequence[EncodedSource]:
        """Encode a batch: [tensors, heads, S, head_dim] of each source, meaningless at padded positions."""
        g = self.geometry
        encoder = (self._lone if alone else self._shared).encoder
        encoded = np.empty((g.num_tensors, source_ids.shape[0], g.num_heads, source_ids.shape[1], g.head_dim), g.dtype)
        binding = encoder.io_binding()
        binding.bind_ortvalue_input("source_ids", ort.OrtValue.ortvalue_from_numpy(source_ids))
        binding.bind_ortvalue_input("source_lengths", ort.OrtValue.ortvalue_from_numpy(source_lengths))
        binding.bind_ortvalue_output("cross_cache", ort.OrtValue.ortvalue_from_numpy(encoded))
        run_graph(encoder, binding)
        return [encoded[:, i] for i in range(source_ids.shape[0])]

    def make_cache(self, *, num_slots: int, width: int, target_capacity: int, source_capacity: int) -> RowCache:
        """Empty caches of a lane, in host memory."""
        return LaneCache(
            self.geometry, num_slots=num_slots, width=width, target_capacity=target_capacity, source_capacity=source_capacity
        )

    def bind(
        self, cache: RowCache, target_ids: NDArray[np.int64], positions: NDArray[np.int32], num_candidates: int
    ) -> LaneDecoder:
        """The decoder graph over one lane's arrays and a cache of ``make_cache``; see ``LaneDecoder``."""
        assert isinstance(cache, LaneCache)
        return HostLaneDecoder(
            self._shared.decoder,
            self._lone.decoder,
            cache,
            target_ids,
            positions,
            num_candidates,
            lone_by_row=self._lone_by_row,
        )


def _interface(session: ort.InferenceSession) -> list[tuple[str, str, list[int | None]]]:
    """What a graph takes and gives: names, types, and sizes that do not change from step to step."""
    return [
        (value.name, value.type, [size if isinstance(size, int) else None for size in value.shape])
        for value in (*session.get_inputs(), *session.get_outputs())
    ]


class HostLaneDecoder(LaneDecoder):
    """Decoder steps over arrays in host memory."""

    def __init__(
        self,
        shared: ort.InferenceSession,
        lone: ort.InferenceSession,
        cache: LaneCache,
        target_ids: NDArray[np.int64],
        positions: NDArray[np.int32],
        num_candidates: int,
        *,
        lone_by_row: bool,
    ) -> None:
        """Of two sessions; with ``lone_by_row`` the second one's graph is for sources of one hypothesis each."""
        super().__init__(target_ids, positions, num_candidates)
        self._shared = shared
        self._lone = lone
        self._lone_by_row = lone_by_row
        # Copies of sources for their rows that may be bound.
        self._by_row: NDArray[Any] | None = None
        # All that the graph returns: caches by operators that append to them, by operators that keep them, or by both.
        self._returned = {output.name for output in shared.get_outputs()}
        self._cache = cache

    @property
    def _source_capacity(self) -> int:
        return self._cache.source_capacity

    def _session(self, *, alone: bool) -> ort.InferenceSession:
        return self._lone if alone else self._shared

    def _is_by_row(self, session: ort.InferenceSession) -> bool:
        return self._lone_by_row and session is self._lone

    def _as_graph_has_it(self, array: NDArray[Any], session: ort.InferenceSession) -> NDArray[Any]:
        return array.reshape(-1, 1, *array.shape[2:]) if self._is_by_row(session) else array

    def _prepare(self, num_sources: int, session: ort.InferenceSession) -> Hashable:
        if self._cache.width > 1:
            if self._is_by_row(session):
                by_row, _ = self._cache.sources_by_row(num_sources)
                if by_row is not self._by_row:
                    self.rebind()
                    self._by_row = by_row
            elif self._by_row is not None and self._by_row.shape[1] > _MOST_ROWS_KEPT:
                self._cache.forget_sources_by_row()
                self.rebind()
        return num_sources, session is self._shared

    def rebind(self) -> None:
        """Forget every binding, and what they have bound."""
        super().rebind()
        self._by_row = None

    def _bind_memory(self, binding: ort.IOBinding, num_sources: int, session: ort.InferenceSession) -> None:
        cache = self._cache
        by_row, rows = self._is_by_row(session), num_sources * cache.width
        cross_attention, source_lengths = (
            cache.sources_by_row(num_sources) if by_row else (cache.cross_attention, cache.source_lengths)
        )
        num_read = rows if by_row else num_sources
        inputs = {
            "target_ids": self._as_graph_has_it(self._target_ids[:num_sources], session),
            "positions": self._as_graph_has_it(self._positions[:num_sources], session),
            "source_lengths": source_lengths[:num_read],
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        # The same value as input and output: the operators work in place.
        for i, tensor in enumerate(cache.self_attention):
            self._bind_in_place(binding, "self_cache", i, tensor[:rows])
        for i, tensor in enumerate(cross_attention):
            self._bind_in_place(binding, "cross_cache", i, tensor[:num_read])

    def _bind_in_place(self, binding: ort.IOBinding, name: str, number: int, tensor: NDArray[Any]) -> None:
        value = ort.OrtValue.ortvalue_from_numpy(tensor)
        binding.bind_ortvalue_input(f"{name}.{number}", value)
        for returned in (f"{name}_appended.{number}", f"{name}_kept.{number}"):
            if returned in self._returned:
                binding.bind_ortvalue_output(returned, value)
