"""The parity certificate: how far the exported graphs are from the trained model, measured, and the gate.

Every comparison is made against the same reference, the model's uncached full pass in float32, at every position of its own
greedy translations of sample sources (``samples.py``). Agreement at every position given the same prefix means, by
induction, the same greedy translation.
Does not know: where graphs come from or go to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from export.graphs import DecoderStepGraph, EncoderGraph, lay_out
from export.model import ModelConfig, Transformer
from export.onnx_export import example_step
from export.samples import Sample
from serving.errors import ExportError
from serving.manifest import Comparison
from serving.runtime import load_graph, pad_sources

# What everything is compared with, for the certificate.
REFERENCE_NAME = "PyTorch, fp32, uncached"
# Largest absolute difference of any logit, for graphs that compute in float32.
FP32_LOGIT_TOLERANCE = 1e-3
# Tokens of a reference translation at most: a model that does not stop is compared on so many.
_LONGEST_TARGET = 64
# Relative difference of logits that log-softmax may not tell apart.
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model itself says."""

    source_ids: tuple[int, ...]
    # Start token, what the target is made to start with, then its greedy translation, without the end-of-sentence token.
    target_ids: tuple[int, ...]
    # The logits, or the file that has them: those of a large vocabulary's references together are as large as the model.
    stored_logits: NDArray[np.float32] | Path

    @property
    def logits(self) -> NDArray[np.float32]:
        """[len(target_ids), vocabulary], from the uncached pass over target_ids."""
        if isinstance(self.stored_logits, Path):
            loaded: NDArray[np.float32] = np.load(self.stored_logits)
            return loaded
        return self.stored_logits


# Logits [positions, at least the vocabulary] of one graph, stepped through source_ids and target_ids.
Stepper = Callable[[Reference], NDArray[np.float32]]


@torch.no_grad()
def make_references(model: Transformer, samples: Sequence[Sample], *, logits_directory: Path | None = None) -> list[Reference]:
    """Greedy translations by the uncached pass, which computes the whole prefix anew.

    They are drafted with caches, and one uncached pass over a draft says whether each of its tokens is the one that the pass
    itself would have chosen. Where one is not, the draft is cut there and goes on with the pass's own: the outcome is the same
    as of a pass for every token.

    Args:
        model: trained.
        samples: their sources and how their targets start.
        logits_directory: where files for the logits are made; None keeps them in memory.

    Raises:
        ExportError: the model's logits are not finite, or a file cannot be written.
    """
    config = model.config
    longest = min(_LONGEST_TARGET, config.max_positions)
    encoder, decoder = lay_out(model)
    references: list[Reference] = []
    for sample in samples:
        source = sample.source_ids
        source_ids, lengths = torch.tensor([list(source)]), torch.tensor([len(source)])
        target = [config.decoder_start_id, *sample.target_prefix][:longest]
        while True:
            given = len(target) - 1
            draft = _drafted(encoder, decoder, config, source, target, longest)
            logits = model(source_ids, lengths, torch.tensor([draft]))[0]
            if not logits.isfinite().all():
                raise ExportError("the model's own logits are not finite; nothing was written")
            best = _decodable(logits.numpy(), config).argmax(axis=1).tolist()
            # Tokens that are given already are not asked for again: the model need not have chosen the first ones.
            agreed = next((i for i in range(given, len(draft) - 1) if best[i] != draft[i + 1]), len(draft) - 1)
            target = draft[: agreed + 1]
            if best[agreed] == config.eos_id or len(target) == longest:
                break
            target.append(best[agreed])
        kept = logits.numpy()[: len(target)]
        stored = kept if logits_directory is None else _stored(kept, logits_directory / f"{len(references)}.npy")
        references.append(Reference(source, tuple(target), stored))
    return references


def _stored(logits: NDArray[np.float32], path: Path) -> Path:
    try:
        path.parent.mkdir(exist_ok=True)
        np.save(path, logits)
    except OSError as error:
        raise ExportError(f"the model's logits could not be stored: {error}") from error
    return path


def _drafted(
    encoder: EncoderGraph, decoder: DecoderStepGraph, config: ModelConfig, source: Sequence[int], prefix: list[int], longest: int
) -> list[int]:
    """A greedy continuation of ``prefix`` with caches, up to the end of the sentence or to ``longest`` tokens."""
    decoding = _EagerDecoding(encoder, decoder, config, source, longest)
    target = list(prefix)
    for token in prefix[:-1]:
        decoding.step(token)
    while len(target) < longest:
        logits = decoding.step(target[-1])
        best = int(_decodable(logits[None, : config.target_vocab_size], config).argmax())
        if best == config.eos_id:
            break
        target.append(best)
    return target


class _EagerDecoding:
    """One target, decoded step by step by graph modules, in PyTorch."""

    def __init__(
        self, encoder: EncoderGraph, decoder: DecoderStepGraph, config: ModelConfig, source: Sequence[int], target_capacity: int
    ) -> None:
        source_ids, lengths = pad_sources([source], config.pad_id)
        self._decoder = decoder
        self._lengths = torch.from_numpy(lengths)
        encoded = encoder(torch.from_numpy(source_ids), self._lengths)
        self._cross = list(encoded)
        self._cache = _empty_cache(config, target_capacity, encoded.dtype)
        self._position = 0

    def step(self, token: int) -> NDArray[np.float32]:
        """The logits after one more token: [padded vocabulary]."""
        _, _, logits, _, self._cache, _ = self._decoder(
            torch.tensor([[token]]),
            torch.tensor([[self._position]], dtype=torch.int32),
            torch.tensor(self._position + 1, dtype=torch.int32),
            self._lengths,
            torch.arange(1),
            torch.tensor(True),
            torch.tensor(False),
            self._cache,
            self._cross,
        )
        self._position += 1
        stepped: NDArray[np.float32] = logits[0, 0].numpy()
        return stepped


def pytorch_stepper(model: Transformer) -> Stepper:
    """The graphs' modules run eagerly: incremental decoding with caches, in PyTorch."""
    return module_stepper(model.config, *lay_out(model))


def module_stepper(config: ModelConfig, encoder: EncoderGraph, decoder: DecoderStepGraph) -> Stepper:
    """Any graph modules run eagerly."""

    @torch.no_grad()
    def step_through(reference: Reference) -> NDArray[np.float32]:
        decoding = _EagerDecoding(encoder, decoder, config, reference.source_ids, len(reference.target_ids))
        return np.stack([decoding.step(token) for token in reference.target_ids])

    return step_through


def onnx_stepper(
    config: ModelConfig, encoder_onnx: Path | bytes, decoder_onnx: Path | bytes, *, name: str, device: str = "cpu"
) -> Stepper:
    """The exported graphs on ONNX Runtime, loaded as serving loads them, with the self-attention cache appended to in place.

    Args:
        config: the model's.
        encoder_onnx: a file, or the serialized graph.
        decoder_onnx: the same.
        name: of their comparison, for errors. One that the stepper raises is an ExportError: what the decoder calls its best
            candidate is not that.
        device: "cpu" or "cuda".

    Raises:
        ServerStartError: the device is not there.
    """
    encoder, decoder = (load_graph(graph, device=device) for graph in (encoder_onnx, decoder_onnx))
    outputs = {output.name for output in decoder.get_outputs()}

    def step_through(reference: Reference) -> NDArray[np.float32]:
        source_ids, lengths = pad_sources([reference.source_ids], config.pad_id)
        (cross,) = encoder.run(["cross_cache"], {"source_ids": source_ids, "source_lengths": lengths})
        binding = decoder.io_binding()
        empty = [tensor.numpy().astype(cross.dtype) for tensor in _empty_cache(config, len(reference.target_ids), torch.float32)]
        for kind, tensors in (("cross_cache", cross), ("self_cache", empty)):
            for i, tensor in enumerate(tensors):
                value = ort.OrtValue.ortvalue_from_numpy(tensor, device, 0)
                binding.bind_ortvalue_input(f"{kind}.{i}", value)
                for after in {f"{kind}_appended.{i}", f"{kind}_kept.{i}"} & outputs:
                    binding.bind_ortvalue_output(after, value)
        logits = []
        for position, token in enumerate(reference.target_ids):
            # Bound anew for each step: what is bound is copied to the device then, and not when the graph runs.
            feeds = {
                "target_ids": np.array([[token]]),
                "positions": np.array([[position]], np.int32),
                "longest": np.array(position + 1, np.int32),
                "source_lengths": lengths,
                "candidate_ranks": np.arange(1),
                "log_probs_wanted": np.array(False),
                "attention_wanted": np.array(False),
            }
            for fed, array in feeds.items():
                binding.bind_cpu_input(fed, array)
            for fetched in ("candidate_ids", "logits"):
                binding.bind_output(fetched)
            decoder.run_with_iobinding(binding)
            candidate_ids, step_logits = (output.numpy() for output in binding.get_outputs()[-2:])
            best = step_logits[0, 0, candidate_ids[0, 0, 0]]
            # By their logits: where two are equal but for rounding, either may come first.
            if np.isfinite(step_logits).all() and best < step_logits.max() - _ROUNDING * max(1.0, abs(best)):
                raise ExportError(f"{name}: the decoder's best candidate is not the best of its own logits; nothing was written")
            logits.append(step_logits[0, 0])
        return np.stack(logits)

    return step_through


def compare(
    references: Sequence[Reference],
    stepper: Stepper,
    config: ModelConfig,
    *,
    name: str,
    tolerance: float | None,
    progress: Callable[[], object] = lambda: None,
) -> Comparison:
    """Step a graph through every reference and measure.

    Args:
        references: what to compare with.
        stepper: the graph.
        config: the model's.
        name: of the comparison, for errors.
        tolerance: of the logits; None measures without a gate.
        progress: called after each sentence.

    Raises:
        ExportError: a logit is not finite.
    """
    differences, agreed, tokens = [0.0], 0, 0
    for reference in references:
        logits = _decodable(stepper(reference)[:, : config.target_vocab_size], config)
        expected = _decodable(reference.logits, config)
        decodable = expected > -np.inf
        differences.append(float(np.abs(logits[decodable] - expected[decodable]).max()))
        agreed += int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())
        tokens += len(expected)
        progress()
    worst = float(np.max(differences))  # not a number if any is
    if not np.isfinite(worst):
        raise ExportError(f"{name}: the graphs' logits are not finite; nothing was written")
    return Comparison(
        reference=REFERENCE_NAME, max_abs_logit_difference=worst, token_agreement=agreed / tokens, tolerance=tolerance
    )


def check(comparisons: dict[str, Comparison]) -> None:
    """The gate.

    Raises:
        ExportError: naming every comparison that exceeds its tolerance, or that has one and disagrees on any token.
    """
    faults = [
        f"{name}: largest logit difference {c.max_abs_logit_difference:.2e} (tolerance {c.tolerance:.0e}), "
        f"greedy token agreement {c.token_agreement:.4%} (100 % is needed)"
        for name, c in comparisons.items()
        if c.tolerance is not None and not (c.max_abs_logit_difference <= c.tolerance and c.token_agreement == 1)
    ]
    if faults:
        raise ExportError("\n  ".join(["the graphs are not close enough to the model; nothing was written:", *faults]))


def check_same_bits(name: str, logits: NDArray[np.float32], of_lone: NDArray[np.float32]) -> None:
    """Both decoders of one export are one: what a certificate says of the first it says of the second.

    Raises:
        ExportError: they differ. They are of one trace, so that this is a fault of the runtime's or of ours.
    """
    if not np.array_equal(logits, of_lone):
        raise ExportError(
            f"{name}: the decoder of lone workers has other logits than the decoder; nothing was written. This should not "
            "happen, whatever the model: please report it, with the version of onnxruntime"
        )


def _decodable(logits: NDArray[np.float32], config: ModelConfig) -> NDArray[np.float32]:
    """A copy with the tokens that are never decoded out of the race: [positions, vocabulary]."""
    logits = logits.copy()
    logits[:, config.never_decoded] = -np.inf
    return logits


def _empty_cache(config: ModelConfig, target_capacity: int, dtype: torch.dtype) -> list[torch.Tensor]:
    step = example_step(config, sources=1, width=1, source_capacity=1, target_capacity=target_capacity, dtype=dtype)
    cache: list[torch.Tensor]
    *_, cache, _ = step
    return cache
