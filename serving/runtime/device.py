"""The graphs on a device: caches and what the encoder makes stay in its memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from serving.bundle import Bundle
from serving.device_cache import DeviceArray, DeviceLaneCache, DeviceSource
from serving.kv_cache import EncodedSource, RowCache
from serving.runtime.base import LaneDecoder, ModelSession
from serving.runtime.graphs import load_graphs, run_graph


class DeviceModelSession(ModelSession):
    """The graphs on a device; what they make of a source stays there."""

    def __init__(self, bundle: Bundle, *, device: str = "cuda", threads: int = 1) -> None:
        """Load the graphs, that which moves rows of the caches among them.

        Raises:
            ServerStartError: the device is not there, or the installed ONNX Runtime cannot use it.
            BundleError: a graph that cannot be loaded, or is not of this format.
        """
        paths = (bundle.encoder_path, bundle.decoder_path, bundle.cache_rows_path)
        self._encoder, self._decoder, gather = load_graphs(bundle, paths, device=device, threads=threads)
        super().__init__(bundle, self._decoder)
        self._memory = OrtDeviceMemory(device, gather)

    def encode(
        self, source_ids: NDArray[np.int64], source_lengths: NDArray[np.int32], *, alone: bool = False
    ) -> Sequence[EncodedSource]:
        """Encode a batch; see ``ModelSession.encode``. There is one worker, always alone."""
        g = self.geometry
        sources, positions = source_ids.shape
        encoded = self._memory.empty((g.num_tensors, sources, g.num_heads, positions, g.head_dim), g.dtype)
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("source_ids", source_ids)
        binding.bind_cpu_input("source_lengths", source_lengths)
        self._memory.bind_output(binding, "cross_cache", encoded)
        run_graph(self._encoder, binding)
        return [DeviceSource(encoded, i) for i in range(sources)]

    def make_cache(self, *, num_slots: int, width: int, target_capacity: int, source_capacity: int) -> DeviceLaneCache:
        """Empty caches of a lane, on the device."""
        return DeviceLaneCache(
            self.geometry,
            self._memory,
            num_slots=num_slots,
            width=width,
            target_capacity=target_capacity,
            source_capacity=source_capacity,
        )

    def bind(
        self, cache: RowCache, target_ids: NDArray[np.int64], positions: NDArray[np.int32], num_candidates: int
    ) -> LaneDecoder:
        """The decoder graph over one lane's arrays and a cache of ``make_cache``; see ``LaneDecoder``."""
        assert isinstance(cache, DeviceLaneCache)
        return DeviceLaneDecoder(self._decoder, self._memory, cache, target_ids, positions, num_candidates)


class OrtDeviceMemory:
    """Memory of a device, as ONNX Runtime gives it; a ``DeviceMemory``."""

    def __init__(self, device: str, gather: ort.InferenceSession) -> None:
        """Of the first such device; ``gather`` is the bundle's graph that moves rows."""
        self._device = device
        self._gather = gather

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """New memory with anything in it, numbers or not."""
        return self._array(ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, 0), shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """New memory."""
        return self._array(ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self._device, 0), shape, dtype)

    def upload(self, target: DeviceArray, values: NDArray[np.generic]) -> None:
        """Overwrite a whole array that ``zeros`` or ``empty`` gave."""
        assert isinstance(target.owner, ort.OrtValue)
        target.owner.update_inplace(values)

    def gather(self, sources: Sequence[DeviceArray], rows: NDArray[np.int64], targets: Sequence[DeviceArray]) -> None:
        """For each pair, target[i] = source[rows[i]]: [rows, values] each.

        Raises:
            EngineError: the runtime failed.
        """
        binding = self._gather.io_binding()
        binding.bind_cpu_input("rows", rows)
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            self.bind_input(binding, f"source.{i}", source)
            self.bind_output(binding, f"target.{i}", target)
        run_graph(self._gather, binding)

    def bind_input(self, binding: ort.IOBinding, name: str, array: DeviceArray) -> None:
        """Let a graph read an array where it is."""
        binding.bind_input(name, self._device, 0, array.dtype, array.shape, array.address)

    def bind_output(self, binding: ort.IOBinding, name: str, array: DeviceArray) -> None:
        """Let a graph write to an array."""
        binding.bind_output(name, self._device, 0, array.dtype, array.shape, array.address)

    @staticmethod
    def _array(value: ort.OrtValue, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        return DeviceArray(value.data_ptr(), shape, dtype, value)


class DeviceLaneDecoder(LaneDecoder):
    """Decoder steps over caches on a device.

    A binding copies an input that lies on another device when it is made, not when it is run. So what is said of each row has
    a place of its own on the device, is bound there, and is copied there before each step.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        memory: OrtDeviceMemory,
        cache: DeviceLaneCache,
        target_ids: NDArray[np.int64],
        positions: NDArray[np.int32],
        num_candidates: int,
    ) -> None:
        super().__init__(target_ids, positions, num_candidates)
        self._decoder = session
        self._keeps_cross_cache = "cross_cache_kept.0" in {output.name for output in session.get_outputs()}
        self._memory = memory
        self._cache = cache
        # By the graph's name: the host's array and its place on the device.
        self._uploads = {
            name: (array, memory.zeros(array.shape, array.dtype))
            for name, array in (("target_ids", target_ids), ("positions", positions), ("source_lengths", cache.source_lengths))
        }

    @property
    def _source_capacity(self) -> int:
        return self._cache.source_capacity

    def _session(self, *, alone: bool) -> ort.InferenceSession:
        return self._decoder

    def _prepare(self, num_sources: int, session: ort.InferenceSession) -> Hashable:
        self._cache.settle(num_sources)
        for array, place in self._uploads.values():
            self._memory.upload(place, array)
        return num_sources, self._cache.turn

    def _bind_memory(self, binding: ort.IOBinding, num_sources: int, session: ort.InferenceSession) -> None:
        inputs = {name: place.part(0, num_sources) for name, (_, place) in self._uploads.items()}
        for name, array in inputs.items():
            self._memory.bind_input(binding, name, array)
        # The same address as input and output: the operators work in place.
        for i, tensor in enumerate(self._cache.self_attention(num_sources)):
            self._memory.bind_input(binding, f"self_cache.{i}", tensor)
            self._memory.bind_output(binding, f"self_cache_appended.{i}", tensor)
        for i, tensor in enumerate(self._cache.cross_attention(num_sources)):
            self._memory.bind_input(binding, f"cross_cache.{i}", tensor)
            if self._keeps_cross_cache:
                self._memory.bind_output(binding, f"cross_cache_kept.{i}", tensor)
