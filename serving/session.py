"""A bundle's graphs on ONNX Runtime: ``encode`` and ``step``.

The only importer of onnxruntime. Knows graph inputs and outputs by name, devices, threads and binding; does not know
sequences, scheduling, search or text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serving.bundle import Bundle
from serving.errors import BundleError, EngineError, ServerStartError
from serving.kv_cache import CacheGeometry, LaneCache

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_graph(graph: Path | bytes, *, device: str = "cpu", threads: int = 1) -> ort.InferenceSession:
    """A graph as serving runs it.

    Args:
        graph: a file, or the serialized model.
        device: "cpu" or "cuda".
        threads: CPU threads of one call; 1 runs it on the caller's.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # On CPU the fused SkipLayerNormalization takes several times as long as Add and LayerNormalization; on CUDA it is right.
    disabled = ["SkipLayerNormFusion"] if device == "cpu" else []
    model = str(graph) if isinstance(graph, Path) else graph
    return ort.InferenceSession(model, options, [_PROVIDERS[device]], disabled_optimizers=disabled)


class ModelSession:
    """Both graphs, loaded once; any number of threads may run them, each on its own arrays."""

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int = 1) -> None:
        """Load the graphs.

        Args:
            bundle: a bundle that was read, and so checked.
            device: "cpu" or "cuda".
            threads: CPU threads of one call; 1 runs it on the caller's.

        Raises:
            ServerStartError: the installed ONNX Runtime has no such device.
            BundleError: a graph that cannot be loaded, or is not of this format.
        """
        provider = _PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise ServerStartError(
                f"device {device}: the installed ONNX Runtime offers {', '.join(ort.get_available_providers())}; "
                "CUDA needs the extra `gpu` (instead of `cpu`) and an NVIDIA driver"
            )
        if device == "cuda":
            ort.preload_dlls()
        architecture = bundle.manifest.architecture
        precision = bundle.manifest.precision
        self.device = device
        self.eos_id = bundle.manifest.ids.eos
        self.pad_id = bundle.manifest.ids.pad
        self.decoder_start_id = bundle.manifest.ids.decoder_start
        # Candidates that a step can return for each row.
        self.max_candidates = bundle.manifest.limits.max_candidates
        self.geometry = CacheGeometry(
            num_tensors=2 * architecture.num_decoder_layers,
            num_heads=architecture.num_heads,
            head_dim=architecture.head_dim,
            dtype=np.float16 if precision == "fp16" else np.float32,
        )
        try:
            self._encoder, self._decoder = (
                load_graph(path, device=device, threads=threads) for path in (bundle.encoder_path, bundle.decoder_path)
            )
        except Exception as error:  # onnxruntime raises a dozen unrelated classes here
            raise BundleError(bundle.directory, [f"a graph cannot be loaded: {error}"]) from error
        if device == "cuda" and provider not in self._decoder.get_providers():
            raise ServerStartError("device cuda: ONNX Runtime could not use the GPU and fell back to the CPU")

    def encode(self, source_ids: NDArray[np.int64], source_lengths: NDArray[np.int32]) -> NDArray[np.floating]:
        """Encode a batch.

        Args:
            source_ids: [sources, S], padded to the right.
            source_lengths: [sources].

        Returns:
            Cross-attention keys and values [tensors, sources, heads, S, head_dim]; meaningless at padded positions.

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
        return encoded

    def bind(
        self, cache: LaneCache, target_ids: NDArray[np.int64], positions: NDArray[np.int32], num_candidates: int
    ) -> LaneDecoder:
        """The decoder graph over one lane's arrays; see ``LaneDecoder``."""
        return LaneDecoder(self._decoder, cache, target_ids, positions, num_candidates)


class LaneDecoder:
    """Decoder steps of one lane.

    Bindings are made once for each number of sources and kept, so that a step hands nothing over but a call: the graph
    reads and writes the lane's arrays where they are.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: LaneCache,
        target_ids: NDArray[np.int64],
        positions: NDArray[np.int32],
        num_candidates: int,
    ) -> None:
        """Bind arrays by address: target_ids and positions [slots, width] must stay the same objects."""
        slots, width = target_ids.shape
        self._session = session
        self._cache = cache
        self._target_ids = target_ids
        self._positions = positions
        self._longest = np.zeros((), np.int32)
        self._ranks = np.arange(num_candidates, dtype=np.int64)
        self._candidate_ids = np.zeros((slots, width, num_candidates), np.int64)
        self._candidate_log_probs = np.zeros((slots, width, num_candidates), np.float32)
        self._bindings: dict[int, ort.IOBinding] = {}

    def rebind(self) -> None:
        """Forget every binding: the cache's arrays are new ones."""
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
        binding = self._bindings.get(num_sources)
        if binding is None:
            binding = self._bindings[num_sources] = self._bind(num_sources)
        _run(self._session, binding)
        return self._candidate_ids[:num_sources], self._candidate_log_probs[:num_sources]

    def _bind(self, n: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        cache = self._cache
        rows = n * cache.width
        inputs = {
            "target_ids": self._target_ids[:n],
            "positions": self._positions[:n],
            "longest": self._longest,
            "source_lengths": cache.source_lengths[:n],
            "candidate_ranks": self._ranks,
        }
        for name, array in itertools.chain(
            inputs.items(), ((f"cross_cache.{i}", tensor[:n]) for i, tensor in enumerate(cache.cross_attention))
        ):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for i, tensor in enumerate(cache.self_attention):
            # The same value as input and output: the operator appends in place.
            value = ort.OrtValue.ortvalue_from_numpy(tensor[:rows])
            binding.bind_ortvalue_input(f"self_cache.{i}", value)
            binding.bind_ortvalue_output(f"self_cache_appended.{i}", value)
        for name, array in (
            ("candidate_ids", self._candidate_ids[:n]),
            ("candidate_log_probs", self._candidate_log_probs[:n]),
        ):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        return binding


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
