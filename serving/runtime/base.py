"""What the engine asks of a session and of a lane's decoder, and what is the same wherever the graphs run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.kv_cache import CacheGeometry, EncodedSource, RowCache
from serving.runtime.graphs import run_graph

_CACHE_TYPES: dict[str, DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_SMALLEST_SOURCE_CAPACITY = 32
# Where a source costs its own length, sources up to so many tokens share a lane.
_LONGEST_SHARED_SOURCE = 128
# A cache's capacity in tokens is a multiple of this: a row whose part is not used still costs the way past it.
_SOURCE_CAPACITY_STEP = 8


class ModelSession(ABC):
    """Both graphs, loaded once; any number of threads may run them, each on its own arrays."""

    def __init__(self, bundle: Bundle, decoder: ort.InferenceSession) -> None:
        """What a bundle and its decoder tell of themselves.

        Raises:
            BundleError: the decoder is not of this format.
        """
        architecture = bundle.manifest.architecture
        self.eos_id = bundle.manifest.ids.eos
        self.pad_id = bundle.manifest.ids.pad
        self.decoder_start_id = bundle.manifest.ids.decoder_start
        # Candidates that a step can return for each row.
        self.max_candidates = bundle.manifest.limits.max_candidates
        self.geometry = CacheGeometry(
            num_tensors=2 * architecture.num_decoder_layers,
            num_heads=architecture.num_heads,
            head_dim=architecture.head_dim,
            dtype=_cache_type(bundle, decoder),
        )
        # Whether a source costs its own length in every step, or that of the lane's capacity.
        self._is_ragged = "cross_cache_kept.0" in {output.name for output in decoder.get_outputs()}

    @abstractmethod
    def encode(
        self, source_ids: NDArray[np.int64], source_lengths: NDArray[np.int32], *, alone: bool = False
    ) -> Sequence[EncodedSource]:
        """Encode a batch.

        Args:
            source_ids: [sources, S], padded to the right.
            source_lengths: [sources].
            alone: whether the CPUs of other workers are idle.

        Returns:
            Of each source, its cross-attention keys and values: what the caches of this session's ``make_cache`` take.

        Raises:
            EngineError: the runtime failed.
        """

    @abstractmethod
    def make_cache(self, *, num_slots: int, width: int, target_capacity: int, source_capacity: int) -> RowCache:
        """Empty caches of a lane, where this session's graphs run."""

    @abstractmethod
    def bind(
        self, cache: RowCache, target_ids: NDArray[np.int64], positions: NDArray[np.int32], num_candidates: int
    ) -> LaneDecoder:
        """The decoder graph over one lane's arrays and a cache of ``make_cache``; see ``LaneDecoder``."""

    def source_bucket(self, length: int) -> int:
        """Sources of one bucket may share a lane.

        A lane that pads its sources to its capacity has those of one power of two: what becomes of a source must follow from
        its own length alone. Where a source costs its own length, usual ones share a lane, whose memory no long one makes grow.
        """
        smallest = _LONGEST_SHARED_SOURCE if self._is_ragged else _SMALLEST_SOURCE_CAPACITY
        return max(smallest, 1 << (length - 1).bit_length())

    def source_capacity(self, length: int) -> int:
        """Tokens of source that a lane makes room for when one of so many comes."""
        if not self._is_ragged:
            return self.source_bucket(length)
        return max(_SMALLEST_SOURCE_CAPACITY, -(-length // _SOURCE_CAPACITY_STEP) * _SOURCE_CAPACITY_STEP)


class Stepped(NamedTuple):
    """What a step says of the next tokens: the lane's own arrays, which the next step writes anew."""

    # [sources, W, K], best first.
    candidate_ids: NDArray[np.int64]
    # Their log-probabilities, or else their logits.
    candidate_log_probs: NDArray[np.float32]
    # [sources, W, padded vocabulary], where they were wanted.
    logits: NDArray[np.float32] | None
    # [sources, W, source capacity], where it was wanted: what share of the attention each source token has, 0 beyond a source.
    attention: NDArray[np.float32] | None


class LaneDecoder(ABC):
    """Decoder steps of one lane.

    Bindings are made once for each number of sources and each decoder, and kept until memory moves, so that a step hands nothing
    over but a call: the graph reads and writes the caches where they are.
    """

    def __init__(self, target_ids: NDArray[np.int64], positions: NDArray[np.int32], num_candidates: int) -> None:
        """Bind arrays by address: target_ids and positions [slots, width] must stay the same objects."""
        slots, width = target_ids.shape
        self._target_ids = target_ids
        self._positions = positions
        # By the graph's name, what it reads in host memory beside the rows' own.
        longest, log_probs_wanted, attention_wanted = np.zeros((), np.int32), np.ones((), np.bool_), np.zeros((), np.bool_)
        self._told: dict[str, NDArray[Any]] = {
            "longest": longest,
            "candidate_ranks": np.arange(num_candidates, dtype=np.int64),
            "log_probs_wanted": log_probs_wanted,
            "attention_wanted": attention_wanted,
        }
        # What changes of that from step to step, to be written without a call of NumPy's.
        self._longest, self._log_probs_wanted, self._attention_wanted = longest.data, log_probs_wanted.data, attention_wanted.data
        self._candidate_ids = np.zeros((slots, width, num_candidates), np.int64)
        self._candidate_log_probs = np.zeros((slots, width, num_candidates), np.float32)
        # [slots, width, padded vocabulary], once somebody wants them.
        self._logits: NDArray[np.float32] | None = None
        # [slots, width, source capacity], once somebody wants it.
        self._attention: NDArray[np.float32] | None = None
        self._bindings: dict[Hashable, tuple[ort.IOBinding, Stepped]] = {}

    def rebind(self) -> None:
        """Forget every binding: the cache's memory is new, and its capacity may be."""
        self._bindings.clear()
        self._attention = None

    def step(
        self,
        num_sources: int,
        longest: int,
        *,
        log_probs_wanted: bool = True,
        logits_wanted: bool = False,
        attention_wanted: bool = False,
        alone: bool = False,
    ) -> Stepped:
        """Decode one token of every row of the first ``num_sources`` slots.

        Args:
            num_sources: slots in use.
            longest: 1 + the largest position of any of their rows.
            log_probs_wanted: otherwise candidates may come with their logits instead.
            logits_wanted: all logits too.
            attention_wanted: and what the rows attend to in their sources.
            alone: whether the CPUs of other workers are idle.

        Raises:
            EngineError: the runtime failed; the rows' caches are then in no defined state.
        """
        self._longest[()] = longest
        self._log_probs_wanted[()] = log_probs_wanted
        self._attention_wanted[()] = attention_wanted
        session = self._session(alone=alone)
        key = self._prepare(num_sources, session), logits_wanted, attention_wanted
        bound = self._bindings.get(key)
        if bound is None:
            bound = self._bindings[key] = self._bind(
                session, num_sources, logits_wanted=logits_wanted, attention_wanted=attention_wanted
            )
        binding, stepped = bound
        run_graph(session, binding)
        return stepped

    def _bind(
        self, session: ort.InferenceSession, num_sources: int, *, logits_wanted: bool, attention_wanted: bool
    ) -> tuple[ort.IOBinding, Stepped]:
        """All that a step reads and writes, and what of it is for the search."""
        binding = session.io_binding()
        for name, array in self._told.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._bind_memory(binding, num_sources, session)
        stepped = Stepped(
            self._candidate_ids[:num_sources],
            self._candidate_log_probs[:num_sources],
            self._make_logits(session)[:num_sources] if logits_wanted else None,
            self._make_attention()[:num_sources] if attention_wanted else None,
        )
        # Its fields are called as the graph's outputs are.
        for name, written in stepped._asdict().items():
            if written is not None:
                binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(self._as_graph_has_it(written, session)))
        return binding, stepped

    def _as_graph_has_it(self, array: NDArray[Any], session: ort.InferenceSession) -> NDArray[Any]:
        """What is said of rows, [sources, W, ...], as a session's graph reads or writes it: the same memory."""
        return array

    @property
    @abstractmethod
    def _source_capacity(self) -> int:
        """Tokens of a source that the cache has room for."""

    @abstractmethod
    def _session(self, *, alone: bool) -> ort.InferenceSession:
        """The decoder to run."""

    @abstractmethod
    def _prepare(self, num_sources: int, session: ort.InferenceSession) -> Hashable:
        """Bring everything to where the graph reads it; returns what the binding depends on."""

    @abstractmethod
    def _bind_memory(self, binding: ort.IOBinding, num_sources: int, session: ort.InferenceSession) -> None:
        """Bind the caches and what is said of each row."""

    def _make_logits(self, session: ort.InferenceSession) -> NDArray[np.float32]:
        if self._logits is None:
            (columns,) = (output.shape[2] for output in session.get_outputs() if output.name == "logits")
            self._logits = np.zeros((*self._target_ids.shape, columns), np.float32)
        return self._logits

    def _make_attention(self) -> NDArray[np.float32]:
        if self._attention is None:
            self._attention = np.zeros((*self._target_ids.shape, self._source_capacity), np.float32)
        return self._attention


def pad_sources(sources: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ragged source ids -> ids [sources, longest] padded to the right, and lengths [sources]."""
    lengths = [len(source) for source in sources]
    longest = max(lengths)
    ids = [(*source, *(pad_id,) * (longest - len(source))) for source in sources]
    return np.array(ids, np.int64), np.array(lengths, np.int32)


def _cache_type(bundle: Bundle, decoder: ort.InferenceSession) -> DTypeLike:
    """What the decoder keeps its caches in."""
    types = {graph_input.name: str(graph_input.type) for graph_input in decoder.get_inputs()}
    found = types.get("self_cache.0", "missing")
    if found not in _CACHE_TYPES:
        raise BundleError(bundle.directory, [f"{bundle.decoder_path.name}: input self_cache.0 is {found}"])
    return _CACHE_TYPES[found]
