"""A bundle's graphs on ONNX Runtime: ``encode`` and ``step``.

The only importer of onnxruntime. Knows graph inputs and outputs by name, devices, threads and binding; does not know
sequences, scheduling, search or text.

On the CPU the graphs read and write the lane's arrays where they are. On a device the caches and what the encoder makes stay in
the device's memory; only tokens and positions go there, and candidates come back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from serving.bundle import Bundle
from serving.device_cache import DeviceArray, DeviceLaneCache, DeviceSource
from serving.errors import BundleError, EngineError, ServerStartError
from serving.kv_cache import CacheGeometry, EncodedSource, LaneCache, RowCache

_CACHE_TYPES: dict[str, DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_SMALLEST_SOURCE_CAPACITY = 32
_SPIN_US = 50
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Precisions that a device has kernels for, and why it is no others.
_PRECISIONS = {
    "cpu": (("int8", "fp32"), "fp16 is for CUDA: a CPU lacks kernels for its attention"),
    "cuda": (
        ("fp16",),
        "CUDA has kernels for attention over in-place caches in fp16 only, and none for int8 rows",
    ),
}


def load_graph(graph: Path | bytes, *, device: str = "cpu", threads: int = 1) -> ort.InferenceSession:
    """A graph as serving runs it.

    Args:
        graph: a file, or the serialized model.
        device: "cpu" or "cuda".
        threads: CPU threads of one call; 1 runs it on the caller's.

    Raises:
        ServerStartError: the device is not there, or the installed ONNX Runtime cannot use it.
    """
    offered = ort.get_available_providers()
    if _PROVIDERS[device] not in offered:
        raise ServerStartError(
            f"device {device}: the installed ONNX Runtime offers {', '.join(offered)}; "
            "CUDA needs the extra `gpu` (instead of `cpu`) and an NVIDIA driver"
        )
    if device == "cuda":
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Between two operators of a step a helping thread waits awake; between two steps, or with nothing to do, it sleeps.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.log_severity_level = 3
    # On CPU the fused SkipLayerNormalization takes several times as long as Add and LayerNormalization; on CUDA it is right.
    disabled = ["SkipLayerNormFusion"] if device == "cpu" else []
    model = str(graph) if isinstance(graph, Path) else graph
    session = ort.InferenceSession(model, options, [_PROVIDERS[device]], disabled_optimizers=disabled)
    if _PROVIDERS[device] not in session.get_providers():
        raise ServerStartError(f"device {device}: ONNX Runtime could not use it and fell back to the CPU")
    return session


def open_session(bundle: Bundle, *, device: str = "cpu", threads: int = 1) -> ModelSession:
    """Load a bundle's graphs onto a device.

    Args:
        bundle: a bundle that was read, and so checked.
        device: "cpu" or "cuda".
        threads: CPU threads of one call; 1 runs it on the caller's.

    Raises:
        ServerStartError: the device is not there, or has no kernels for the bundle's precision.
        BundleError: a graph that cannot be loaded, or is not of this format.
    """
    precisions, why = _PRECISIONS[device]
    precision = bundle.manifest.precision
    if precision not in precisions:
        remedy = " or ".join(f"--precision {name}" for name in precisions)
        raise ServerStartError(f"device {device} cannot run a bundle of {precision}; export the checkpoint with {remedy} ({why})")
    kind = ModelSession if device == "cpu" else DeviceModelSession
    return kind(bundle, device=device, threads=threads)


class ModelSession:
    """Both graphs, loaded once; any number of threads may run them, each on its own arrays."""

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int = 1) -> None:
        """Load the graphs; see ``open_session``, which checks first that the device has kernels for them.

        Raises:
            ServerStartError: the device is not there, or the installed ONNX Runtime cannot use it.
            BundleError: a graph that cannot be loaded, or is not of this format.
        """
        architecture = bundle.manifest.architecture
        self._encoder, self._decoder = self._load((bundle.encoder_path, bundle.decoder_path), bundle, device, threads)
        self.eos_id = bundle.manifest.ids.eos
        self.pad_id = bundle.manifest.ids.pad
        self.decoder_start_id = bundle.manifest.ids.decoder_start
        # Candidates that a step can return for each row.
        self.max_candidates = bundle.manifest.limits.max_candidates
        self.geometry = CacheGeometry(
            num_tensors=2 * architecture.num_decoder_layers,
            num_heads=architecture.num_heads,
            head_dim=architecture.head_dim,
            dtype=_cache_type(bundle, self._decoder),
        )
        # Whether a source costs its own length in every step, or that of the lane's capacity.
        self._is_ragged = "cross_cache_kept.0" in {output.name for output in self._decoder.get_outputs()}

    @staticmethod
    def _load(paths: Iterable[Path], bundle: Bundle, device: str, threads: int) -> list[ort.InferenceSession]:
        try:
            return [load_graph(path, device=device, threads=threads) for path in paths]
        except ServerStartError:
            raise
        except Exception as error:  # onnxruntime raises a dozen unrelated classes here
            raise BundleError(bundle.directory, [f"a graph cannot be loaded: {error}"]) from error

    def encode(self, source_ids: NDArray[np.int64], source_lengths: NDArray[np.int32]) -> Sequence[EncodedSource]:
        """Encode a batch.

        Args:
            source_ids: [sources, S], padded to the right.
            source_lengths: [sources].

        Returns:
            Of each source, its cross-attention keys and values [tensors, heads, S, head_dim], meaningless at padded positions:
            what the caches of this session's ``make_cache`` take.

        Raises:
            EngineError: the runtime failed.
        """
        g = self.geometry
        encoded = np.empty((g.num_tensors, source_ids.shape[0], g.num_heads, source_ids.shape[1], g.head_dim), g.dtype)
        binding = self._encoder.io_binding()
        binding.bind_ortvalue_input("source_ids", ort.OrtValue.ortvalue_from_numpy(source_ids))
        binding.bind_ortvalue_input("source_lengths", ort.OrtValue.ortvalue_from_numpy(source_lengths))
        binding.bind_ortvalue_output("cross_cache", ort.OrtValue.ortvalue_from_numpy(encoded))
        _run(self._encoder, binding)
        return [encoded[:, i] for i in range(source_ids.shape[0])]

    def source_bucket(self, length: int) -> int:
        """Sources of one bucket may share a lane; it is also the capacity that such a lane starts with.

        Where a source costs its own length, all share one. Elsewhere a lane pads its sources to its capacity, which must then
        follow from a source's own length alone: the power of two that holds it, at least 32.
        """
        if self._is_ragged:
            return _SMALLEST_SOURCE_CAPACITY
        return max(_SMALLEST_SOURCE_CAPACITY, 1 << (length - 1).bit_length())

    def make_cache(self, *, num_slots: int, width: int, target_capacity: int, source_capacity: int) -> RowCache:
        """Empty caches of a lane, where this session's graphs run."""
        return LaneCache(
            self.geometry, num_slots=num_slots, width=width, target_capacity=target_capacity, source_capacity=source_capacity
        )

    def bind(
        self, cache: RowCache, target_ids: NDArray[np.int64], positions: NDArray[np.int32], num_candidates: int
    ) -> LaneDecoder:
        """The decoder graph over one lane's arrays and a cache of ``make_cache``; see ``LaneDecoder``."""
        assert isinstance(cache, LaneCache)
        return HostLaneDecoder(self._decoder, cache, target_ids, positions, num_candidates)


class DeviceModelSession(ModelSession):
    """The graphs on a device; what they make of a source stays there."""

    def __init__(self, bundle: Bundle, *, device: str = "cuda", threads: int = 1) -> None:
        """Load the graphs, that which moves rows of the caches among them; see ``ModelSession``."""
        super().__init__(bundle, device=device, threads=threads)
        (gather,) = self._load((bundle.cache_rows_path,), bundle, device, threads)
        self._memory = OrtDeviceMemory(device, gather)

    def encode(self, source_ids: NDArray[np.int64], source_lengths: NDArray[np.int32]) -> list[DeviceSource]:
        """Encode a batch; see ``ModelSession.encode``."""
        g = self.geometry
        sources, positions = source_ids.shape
        encoded = self._memory.empty((g.num_tensors, sources, g.num_heads, positions, g.head_dim), g.dtype)
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("source_ids", source_ids)
        binding.bind_cpu_input("source_lengths", source_lengths)
        self._memory.bind_output(binding, "cross_cache", encoded)
        _run(self._encoder, binding)
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
        _run(self._gather, binding)

    def bind_input(self, binding: ort.IOBinding, name: str, array: DeviceArray) -> None:
        """Let a graph read an array where it is."""
        binding.bind_input(name, self._device, 0, array.dtype, array.shape, array.address)

    def bind_output(self, binding: ort.IOBinding, name: str, array: DeviceArray) -> None:
        """Let a graph write to an array."""
        binding.bind_output(name, self._device, 0, array.dtype, array.shape, array.address)

    @staticmethod
    def _array(value: ort.OrtValue, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        return DeviceArray(value.data_ptr(), shape, dtype, value)


class LaneDecoder(ABC):
    """Decoder steps of one lane.

    Bindings are made once for each number of sources and kept, so that a step hands nothing over but a call: the graph
    reads and writes the caches where they are.
    """

    def __init__(
        self, session: ort.InferenceSession, target_ids: NDArray[np.int64], positions: NDArray[np.int32], num_candidates: int
    ) -> None:
        """Bind arrays by address: target_ids and positions [slots, width] must stay the same objects."""
        slots, width = target_ids.shape
        self._session = session
        self._outputs = {output.name for output in session.get_outputs()}
        self._target_ids = target_ids
        self._positions = positions
        self._longest = np.zeros((), np.int32)
        self._ranks = np.arange(num_candidates, dtype=np.int64)
        self._candidate_ids = np.zeros((slots, width, num_candidates), np.int64)
        self._candidate_log_probs = np.zeros((slots, width, num_candidates), np.float32)
        self._bindings: dict[Hashable, ort.IOBinding] = {}

    def rebind(self) -> None:
        """Forget every binding: the cache's memory is new."""
        self._bindings.clear()

    def step(self, num_sources: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Decode one token of every row of the first ``num_sources`` slots.

        Returns:
            Candidate ids and log-probabilities, [num_sources, width, candidates] each, best first. They are the lane's own
            arrays and are written anew by the next step.

        Raises:
            EngineError: the runtime failed; the rows' caches are then in no defined state.
        """
        self._longest[...] = self._positions[:num_sources].max() + 1
        key = self._prepare(num_sources)
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bindings[key] = self._session.io_binding()
            self._bind_host(binding, num_sources)
            self._bind_memory(binding, num_sources)
        _run(self._session, binding)
        return self._candidate_ids[:num_sources], self._candidate_log_probs[:num_sources]

    @abstractmethod
    def _prepare(self, num_sources: int) -> Hashable:
        """Bring everything to where the graph reads it; returns what the binding depends on."""

    @abstractmethod
    def _bind_memory(self, binding: ort.IOBinding, num_sources: int) -> None:
        """Bind the caches and what is said of each row."""

    def _bind_host(self, binding: ort.IOBinding, num_sources: int) -> None:
        """Bind what is in host memory on every device: for the operator that reads ``longest`` there, and for the search."""
        binding.bind_ortvalue_input("longest", ort.OrtValue.ortvalue_from_numpy(self._longest))
        binding.bind_ortvalue_input("candidate_ranks", ort.OrtValue.ortvalue_from_numpy(self._ranks))
        for name, array in (("candidate_ids", self._candidate_ids), ("candidate_log_probs", self._candidate_log_probs)):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array[:num_sources]))


class HostLaneDecoder(LaneDecoder):
    """Decoder steps over arrays in host memory."""

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: LaneCache,
        target_ids: NDArray[np.int64],
        positions: NDArray[np.int32],
        num_candidates: int,
    ) -> None:
        super().__init__(session, target_ids, positions, num_candidates)
        self._cache = cache

    def _prepare(self, num_sources: int) -> Hashable:
        return num_sources

    def _bind_memory(self, binding: ort.IOBinding, num_sources: int) -> None:
        cache = self._cache
        inputs = {
            "target_ids": self._target_ids[:num_sources],
            "positions": self._positions[:num_sources],
            "source_lengths": cache.source_lengths[:num_sources],
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        # The same value as input and output: the operators work in place.
        for i, tensor in enumerate(cache.self_attention):
            value = ort.OrtValue.ortvalue_from_numpy(tensor[: num_sources * cache.width])
            binding.bind_ortvalue_input(f"self_cache.{i}", value)
            binding.bind_ortvalue_output(f"self_cache_appended.{i}", value)
        for i, tensor in enumerate(cache.cross_attention):
            value = ort.OrtValue.ortvalue_from_numpy(tensor[:num_sources])
            binding.bind_ortvalue_input(f"cross_cache.{i}", value)
            if f"cross_cache_kept.{i}" in self._outputs:
                binding.bind_ortvalue_output(f"cross_cache_kept.{i}", value)


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
        super().__init__(session, target_ids, positions, num_candidates)
        self._memory = memory
        self._cache = cache
        # By the graph's name: the host's array and its place on the device.
        self._uploads = {
            name: (array, memory.zeros(array.shape, array.dtype))
            for name, array in (("target_ids", target_ids), ("positions", positions), ("source_lengths", cache.source_lengths))
        }

    def _prepare(self, num_sources: int) -> Hashable:
        self._cache.settle(num_sources)
        for array, place in self._uploads.values():
            self._memory.upload(place, array)
        return num_sources, self._cache.turn

    def _bind_memory(self, binding: ort.IOBinding, num_sources: int) -> None:
        inputs = {name: place.part(0, num_sources) for name, (_, place) in self._uploads.items()}
        for name, array in inputs.items():
            self._memory.bind_input(binding, name, array)
        # The same address as input and output: the operators work in place.
        for i, tensor in enumerate(self._cache.self_attention(num_sources)):
            self._memory.bind_input(binding, f"self_cache.{i}", tensor)
            self._memory.bind_output(binding, f"self_cache_appended.{i}", tensor)
        for i, tensor in enumerate(self._cache.cross_attention(num_sources)):
            self._memory.bind_input(binding, f"cross_cache.{i}", tensor)
            if f"cross_cache_kept.{i}" in self._outputs:
                self._memory.bind_output(binding, f"cross_cache_kept.{i}", tensor)


def _cache_type(bundle: Bundle, decoder: ort.InferenceSession) -> DTypeLike:
    """What the decoder keeps its caches in."""
    types = {graph_input.name: str(graph_input.type) for graph_input in decoder.get_inputs()}
    found = types.get("self_cache.0", "missing")
    if found not in _CACHE_TYPES:
        raise BundleError(bundle.directory, [f"{bundle.decoder_path.name}: input self_cache.0 is {found}"])
    return _CACHE_TYPES[found]


def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise EngineError(f"a graph failed: {error}") from error


def pad_sources(sources: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ragged source ids -> ids [sources, longest] padded to the right, and lengths [sources]."""
    lengths = np.array([len(source) for source in sources], np.int32)
    ids = np.full((len(sources), int(lengths.max())), pad_id, np.int64)
    for row, source in zip(ids, sources, strict=True):
        row[: len(source)] = source
    return ids, lengths
