"""The attention caches of one lane in a device's memory.

Knows rows, where they are and where they are to be; does not know the runtime: a ``DeviceMemory`` is handed in, which gives
memory and copies rows in it by one operation, a gather. Nothing but indices ever leaves the host.

Changes are lazy. The host composes them, ``origin[to] = origin[from]``, and ``settle`` carries out all of them before the next
step, with one gather over the rows in use into the other of two buffers. When nothing has changed, nothing runs. Two buffers
rather than new memory, so that addresses stay: a binding is good for as long as its buffer's turn comes again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from serving.kv_cache import CacheGeometry, RowCache
from serving.search import Fork


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A contiguous array in a device's memory, or a part of one."""

    address: int
    shape: tuple[int, ...]
    dtype: DTypeLike
    # Whoever holds the memory; it stays for as long as this array does.
    owner: object

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __getitem__(self, index: int) -> DeviceArray:
        """One element of the first axis."""
        assert 0 <= index < self.shape[0]
        return DeviceArray(self.address + index * (self.nbytes // self.shape[0]), self.shape[1:], self.dtype, self.owner)

    def part(self, start: int, stop: int) -> DeviceArray:
        """Elements start .. stop - 1 of the first axis."""
        assert 0 <= start < stop <= self.shape[0]
        element_bytes = self.nbytes // self.shape[0]
        return DeviceArray(self.address + start * element_bytes, (stop - start, *self.shape[1:]), self.dtype, self.owner)

    def rows(self, num_axes: int) -> DeviceArray:
        """The same memory as [rows, values]: a row for each element of the first ``num_axes`` axes together."""
        return self.reshaped((math.prod(self.shape[:num_axes]), math.prod(self.shape[num_axes:])))

    def reshaped(self, shape: tuple[int, ...]) -> DeviceArray:
        """The same memory in another shape of as many elements."""
        assert math.prod(shape) == math.prod(self.shape)
        return DeviceArray(self.address, shape, self.dtype, self.owner)


class DeviceMemory(Protocol):
    """What the caches need of a device."""

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """New memory."""

    def gather(self, sources: Sequence[DeviceArray], rows: NDArray[np.int64], targets: Sequence[DeviceArray]) -> None:
        """For each pair, target[i] = source[rows[i]]: [rows, values] each; no target overlaps a source.

        Raises:
            EngineError: the runtime failed.
        """


@dataclass(frozen=True, slots=True)
class DeviceSource:
    """One source of a batch that was encoded on the device."""

    # [tensors, sources, heads, S, head_dim]
    batch: DeviceArray
    index: int


class _TwoBuffers:
    """Rows of all tensors in two buffers, one of them current, and where each row's contents are now.

    ``origin[row]`` is the row of the current buffer that ``row`` is to have; in a settled state each row's is itself.
    """

    def __init__(self, memory: DeviceMemory, shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> None:
        """Zeros: shape is [tensors, rows, heads, capacity, head_dim]."""
        num_tensors, num_rows, *row = shape
        # One row more than asked for: no step writes it, so that it stays zeros, and growth takes it for what is not there yet.
        buffers = [memory.zeros((num_tensors, num_rows + 1, *row), dtype) for _ in range(2)]
        self._memory = memory
        self._tensors = [[buffer[i] for i in range(num_tensors)] for buffer in buffers]
        self._identity = np.arange(num_rows)
        self.origin = self._identity.copy()
        self.current = 0
        self.nbytes = sum(buffer.nbytes for buffer in buffers)

    def tensors(self, num_rows: int) -> list[DeviceArray]:
        """The first rows of each tensor, in the current buffer: [num_rows, heads, capacity, head_dim]."""
        return [tensor.part(0, num_rows) for tensor in self._tensors[self.current]]

    def settle(self, num_rows: int) -> None:
        """Bring the first rows to where they are to be. The others are free: whatever was to become of them is forgotten."""
        if not np.array_equal(self.origin[:num_rows], self._identity[:num_rows]):
            sources = [tensor.rows(1) for tensor in self._tensors[self.current]]
            targets = [tensor.part(0, num_rows).rows(1) for tensor in self._tensors[1 - self.current]]
            self._memory.gather(sources, self.origin[:num_rows], targets)
            self.current = 1 - self.current
        self.origin[:] = self._identity

    def settle_into(self, grown: _TwoBuffers, num_rows: int) -> None:
        """Bring the first rows to where they are to be in buffers of a larger capacity, a multiple of this one's.

        In each head of a grown row, the first of ``factor`` pieces of the old capacity is the old head, the others are zeros.
        """
        if num_rows == 0:
            return
        old, new = self._tensors[self.current], grown._tensors[grown.current]
        _, num_heads, capacity, _ = old[0].shape
        factor, rest = divmod(new[0].shape[2], capacity)
        assert rest == 0, "a cache grows to a multiple of its capacity"
        zeros = (old[0].shape[0] - 1) * num_heads
        pieces = np.full((num_rows, num_heads, factor), zeros)
        pieces[:, :, 0] = self.origin[:num_rows, None] * num_heads + np.arange(num_heads)
        heads = [tensor.rows(2) for tensor in old]  # [rows * heads, capacity * head_dim]
        targets = [tensor.part(0, num_rows).reshaped((pieces.size, heads[0].shape[1])) for tensor in new]
        self._memory.gather(heads, pieces.ravel(), targets)


class DeviceLaneCache(RowCache):
    """The caches on a device; changes are noted and carried out together, by ``settle``."""

    def __init__(
        self,
        geometry: CacheGeometry,
        memory: DeviceMemory,
        *,
        num_slots: int,
        width: int,
        target_capacity: int,
        source_capacity: int,
    ) -> None:
        super().__init__(
            geometry, num_slots=num_slots, width=width, target_capacity=target_capacity, source_capacity=source_capacity
        )
        self._memory = memory
        self._num_slots = num_slots
        self._rows = self._make_rows(target_capacity)
        self._sources = self._make_sources(source_capacity)
        # By slot: sources that are not in the cache yet.
        self._arriving: dict[int, DeviceSource] = {}

    @property
    def nbytes(self) -> int:
        """Bytes reserved on the device."""
        return self._rows.nbytes + self._sources.nbytes

    @property
    def turn(self) -> tuple[int, int]:
        """Which buffers are current; addresses are the same whenever this is the same, until the cache grows."""
        return self._rows.current, self._sources.current

    def self_attention(self, num_sources: int) -> list[DeviceArray]:
        """Of each tensor the rows of the first slots: [num_sources * width, heads, target capacity, head_dim]."""
        return self._rows.tensors(num_sources * self.width)

    def cross_attention(self, num_sources: int) -> list[DeviceArray]:
        """Of each tensor the first slots: [num_sources, heads, source capacity, head_dim]."""
        return self._sources.tensors(num_sources)

    def write_source(self, slot: int, encoded: DeviceSource, length: int) -> None:
        """Note that a source of ``length`` tokens takes a slot that is free."""
        self._arriving[slot] = encoded
        self.source_lengths[slot] = length
        # What was to come here is of a source that has left.
        self._sources.origin[slot] = slot
        rows = self._rows_of(slot)
        self._rows.origin[rows] = np.arange(rows.start, rows.stop)

    def copy_rows(self, forks: Iterable[Fork]) -> None:
        """Note that hypotheses go on in other rows."""
        for fork in forks:
            self._rows.origin[fork.to_row] = self._rows.origin[fork.from_row]

    def move_source(self, from_slot: int, to_slot: int, num_positions: int) -> None:
        """Note that a source and its rows move to a slot that is free."""
        self._arriving.pop(to_slot, None)
        if from_slot in self._arriving:
            self._arriving[to_slot] = self._arriving.pop(from_slot)
            self._sources.origin[to_slot] = to_slot
        else:
            self._sources.origin[to_slot] = self._sources.origin[from_slot]
        self._rows.origin[self._rows_of(to_slot)] = self._rows.origin[self._rows_of(from_slot)]
        self.source_lengths[to_slot] = self.source_lengths[from_slot]

    def grow_target(self, target_capacity: int, num_slots_used: int) -> None:
        """Make room for longer targets, a multiple of what there is; carries out what was noted of the rows, at once."""
        grown = self._make_rows(target_capacity)
        self._rows.settle_into(grown, num_slots_used * self.width)
        self._rows = grown
        self.target_capacity = target_capacity

    def grow_source(self, source_capacity: int, num_slots_used: int) -> None:
        """Make room for longer sources, a multiple of what there is; carries out what was noted of the sources, at once."""
        grown = self._make_sources(source_capacity)
        self._sources.settle_into(grown, num_slots_used)
        self._sources = grown
        self.source_capacity = source_capacity

    def settle(self, num_sources: int) -> None:
        """Carry out what was noted, for the first slots, which are those in use.

        Raises:
            EngineError: the runtime failed; the caches are then in no defined state.
        """
        self._rows.settle(num_sources * self.width)
        self._sources.settle(num_sources)
        arriving = [slot for slot in sorted(self._arriving) if slot < num_sources]
        # Sources that were encoded together and lie side by side are written together.
        first = 0
        for last, slot in enumerate(arriving):
            following = arriving[last + 1] if last + 1 < len(arriving) else None
            if following != slot + 1 or self._arriving[following].batch is not self._arriving[slot].batch:
                self._write(arriving[first : last + 1])
                first = last + 1
        self._arriving.clear()

    def _write(self, slots: list[int]) -> None:
        """Gather the positions of sources of one batch into slots that lie side by side."""
        g, batch = self.geometry, self._arriving[slots[0]].batch
        encoded_positions = batch.shape[3]
        indices = np.array([self._arriving[slot].index for slot in slots])
        # Beyond its length a source repeats its last position: nobody reads it, but it must be finite.
        positions = np.minimum(np.arange(self.source_capacity), self.source_lengths[slots, None] - 1)  # [slots, capacity]
        heads = indices[:, None] * g.num_heads + np.arange(g.num_heads)  # [slots, heads]
        rows = heads[:, :, None] * encoded_positions + positions[:, None, :]
        targets = [tensor.part(slots[0], slots[-1] + 1).rows(3) for tensor in self._sources.tensors(slots[-1] + 1)]
        self._memory.gather([batch[i].rows(3) for i in range(g.num_tensors)], rows.ravel(), targets)

    def _make_rows(self, target_capacity: int) -> _TwoBuffers:
        g = self.geometry
        shape = (g.num_tensors, self._num_slots * self.width, g.num_heads, target_capacity, g.head_dim)
        return _TwoBuffers(self._memory, shape, g.dtype)

    def _make_sources(self, source_capacity: int) -> _TwoBuffers:
        g = self.geometry
        shape = (g.num_tensors, self._num_slots, g.num_heads, source_capacity, g.head_dim)
        return _TwoBuffers(self._memory, shape, g.dtype)

    def _rows_of(self, slot: int) -> slice:
        return slice(slot * self.width, (slot + 1) * self.width)
