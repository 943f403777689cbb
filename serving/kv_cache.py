"""The attention caches of one lane: what a lane asks of them, and the ones in host memory.

Knows arrays and positions; does not know the runtime, search, sequences or time. The decoder graph writes each row's new key
and value in place; everything else that ever changes a cache is a method here. ``device_cache.py`` has the caches in a
device's memory.

Axes: tensors are key and value of layer 0, of layer 1, and so on. Row = slot * width + beam.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from serving.search import Fork

# A source's cross-attention keys and values, as the session's ``encode`` gives them: what it is, only the session and the
# caches that it makes know.
EncodedSource = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGeometry:
    """What a model's caches look like, whatever the lane."""

    # Keys and values of all decoder layers.
    num_tensors: int
    num_heads: int
    head_dim: int
    # Floating point, or int8 in units that only the graphs know.
    dtype: DTypeLike = np.float32


class RowCache(ABC):
    """Self-attention cache of every row and cross-attention cache of every source of a lane, wherever they are kept."""

    def __init__(
        self, geometry: CacheGeometry, *, num_slots: int, width: int, target_capacity: int, source_capacity: int
    ) -> None:
        self.geometry = geometry
        self.width = width
        self.target_capacity = target_capacity
        self.source_capacity = source_capacity
        self.source_lengths: NDArray[np.int32] = np.ones(num_slots, np.int32)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes reserved."""

    @abstractmethod
    def write_source(self, slot: int, encoded: EncodedSource, length: int) -> None:
        """Store a source of ``length`` tokens in a slot that is free."""

    @abstractmethod
    def copy_rows(self, forks: Iterable[Fork]) -> None:
        """Give a hypothesis' past to a row that goes on from it."""

    @abstractmethod
    def move_source(self, from_slot: int, to_slot: int, num_positions: int) -> None:
        """Move a source and the first ``num_positions`` of its rows into a slot that is free."""

    @abstractmethod
    def grow_target(self, target_capacity: int, num_slots_used: int) -> None:
        """Make room for longer targets; keeps the rows of the first ``num_slots_used`` slots. The memory is new."""

    @abstractmethod
    def grow_source(self, source_capacity: int, num_slots_used: int) -> None:
        """Make room for longer sources; keeps those of the first ``num_slots_used`` slots. The memory is new."""


class LaneCache(RowCache):
    """The caches in host memory; every change is made at once.

    Memory is reserved for all slots at once, and given by the system as rows are first written. Its pages are large, so that a
    row takes its capacity, however little of it is used. Copies of sources for their rows are made, and their memory is
    reserved, when somebody asks for them.
    """

    def __init__(
        self, geometry: CacheGeometry, *, num_slots: int, width: int, target_capacity: int, source_capacity: int
    ) -> None:
        super().__init__(
            geometry, num_slots=num_slots, width=width, target_capacity=target_capacity, source_capacity=source_capacity
        )
        g = geometry
        # Zeros, not garbage: what lies beyond a row's length is masked by adding to its score, and must be finite for that.
        self.self_attention: NDArray[Any] = np.zeros(
            (g.num_tensors, num_slots * width, g.num_heads, target_capacity, g.head_dim), g.dtype
        )
        self.cross_attention: NDArray[Any] = np.zeros(
            (g.num_tensors, num_slots, g.num_heads, source_capacity, g.head_dim), g.dtype
        )
        self._by_row = _SourcesByRow(self.cross_attention, width)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.self_attention.nbytes + self.cross_attention.nbytes + self._by_row.cross_attention.nbytes

    def sources_by_row(self, num_sources: int) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Cross-attention as if each row had a source of its own: copies of what is in the first slots.

        Returns:
            [tensors, rows, heads, source capacity, head_dim], and the lengths of these [rows]. Both are as the slots are now;
            they are the same arrays as in the call before if that was for as many sources or more, and nothing was forgotten or
            grown since.
        """
        if self.width == 1:
            return self.cross_attention, self.source_lengths
        return self._by_row.of(self.cross_attention, self.source_lengths, num_sources)

    def forget_sources_by_row(self) -> None:
        """Give the memory of these copies back."""
        self._by_row = _SourcesByRow(self.cross_attention, self.width)

    def write_source(self, slot: int, encoded: NDArray[Any], length: int) -> None:
        """Store a source's cross-attention keys and values: encoded [tensors, heads, at least length, head_dim]."""
        self.cross_attention[:, slot, :, :length] = encoded[:, :, :length]
        self.source_lengths[slot] = length
        self._by_row.outdated.add(slot)

    def copy_rows(self, forks: Iterable[Fork]) -> None:
        """Give a hypothesis' past to a row that goes on from it."""
        for fork in forks:
            at = slice(fork.start, fork.stop)
            self.self_attention[:, fork.to_row, :, at] = self.self_attention[:, fork.from_row, :, at]

    def move_source(self, from_slot: int, to_slot: int, num_positions: int) -> None:
        """Move a source and the first ``num_positions`` of its rows into a slot that is free."""
        length = int(self.source_lengths[from_slot])
        self.cross_attention[:, to_slot, :, :length] = self.cross_attention[:, from_slot, :, :length]
        self.source_lengths[to_slot] = length
        self._by_row.outdated.add(to_slot)
        from_rows = slice(from_slot * self.width, (from_slot + 1) * self.width)
        to_rows = slice(to_slot * self.width, (to_slot + 1) * self.width)
        self.self_attention[:, to_rows, :, :num_positions] = self.self_attention[:, from_rows, :, :num_positions]

    def grow_target(self, target_capacity: int, num_slots_used: int) -> None:
        """Make room for longer targets; keeps the rows of the first ``num_slots_used`` slots. The array is a new one."""
        old, rows = self.self_attention, num_slots_used * self.width
        grown = np.zeros((*old.shape[:3], target_capacity, old.shape[4]), old.dtype)
        grown[:, :rows, :, : self.target_capacity] = old[:, :rows]
        self.self_attention = grown
        self.target_capacity = target_capacity

    def grow_source(self, source_capacity: int, num_slots_used: int) -> None:
        """Make room for longer sources; keeps those of the first ``num_slots_used`` slots. The array is a new one."""
        old = self.cross_attention
        grown = np.zeros((*old.shape[:3], source_capacity, old.shape[4]), old.dtype)
        grown[:, :num_slots_used, :, : self.source_capacity] = old[:, :num_slots_used]
        self.cross_attention = grown
        self.source_capacity = source_capacity
        self.forget_sources_by_row()


class _SourcesByRow:
    """A copy of its source for each row of a cache, brought up to date when somebody asks for it.

    Its memory is for as many sources as it was asked for at once, rounded up to a power of two.
    """

    def __init__(self, cross_attention: NDArray[Any], width: int) -> None:
        """No copy yet; of an array of the same shape, but for the slots."""
        self._width = width
        self.cross_attention: NDArray[Any] = cross_attention[:, :0].copy()
        self._lengths: NDArray[np.int32] = np.ones(0, np.int32)
        # Slots whose rows have copies of something else.
        self.outdated: set[int] = set()

    def of(
        self, cross_attention: NDArray[Any], source_lengths: NDArray[np.int32], num_sources: int
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """See ``LaneCache.sources_by_row``."""
        width = self._width
        if num_sources * width > len(self._lengths):
            room = min(len(source_lengths), 1 << (num_sources - 1).bit_length())
            tensors, _, *rest = cross_attention.shape
            self.cross_attention = np.zeros((tensors, room * width, *rest), cross_attention.dtype)
            self._lengths = np.ones(room * width, np.int32)
            self.outdated = set(range(room))
        due = {slot for slot in self.outdated if slot < num_sources}
        for slot in due:
            length, rows = int(source_lengths[slot]), slice(slot * width, (slot + 1) * width)
            self.cross_attention[:, rows, :, :length] = cross_attention[:, slot, None, :, :length]
            self._lengths[rows] = length
        self.outdated -= due
        return self.cross_attention, self._lengths
