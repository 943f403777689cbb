"""What every checkpoint reader makes, and how it becomes a module.

Knows the names and shapes that ``Transformer`` needs and how to tell all that is wrong with a set of tensors at once; does not
know any file format.

**Names.** Tensors are called as in ``Transformer(config).state_dict()``. A matrix that several places share has one name, the
first of: ``decoder.embedding.tokens.weight``, ``encoder.embedding.tokens.weight``, ``output.weight``. Tables that are computed
(sinusoidal positions) are no tensors of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from export.model import ModelConfig, Transformer, computed_positions
from serving.errors import CheckpointError
from serving.manifest import AnyTokenizerSpec, DefaultOptions, LanguagePair, LanguageTokens

_TARGET_EMBEDDING = "decoder.embedding.tokens.weight"
_SOURCE_EMBEDDING = "encoder.embedding.tokens.weight"
_OUTPUT = "output.weight"
# Real source sentences, one a line: a file that any format's directory may have beside its own.
SAMPLES_NAME = "samples.txt"

# Values of a tensor that are looked at together: what that takes beside the tensor does not grow with it.
_VALUES_AT_ONCE = 1 << 24
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A trained model, whatever format it came in."""

    # How it is called; never a path.
    name: str
    config: ModelConfig
    # float32, by the names above.
    tensors: dict[str, Tensor]
    languages: list[LanguagePair]
    # Of a model that is told its languages by tokens.
    language_tokens: LanguageTokens | None = None
    # Ids that every source starts with, and whether it ends in the end-of-sentence token.
    source_prefix: tuple[int, ...] = ()
    source_ends_with_eos: bool = True
    # Ids that every target starts with, after the start token.
    target_prefix: tuple[int, ...] = ()
    # What the model's makers chose of how it is decoded, and how many beams; None: they did not say.
    defaults: DefaultOptions = field(default_factory=DefaultOptions)
    num_beams: int | None = None
    tokenizer: AnyTokenizerSpec
    # By the names that ``tokenizer`` uses: where a file is, or its contents where the reader made it.
    tokenizer_files: dict[str, Path | bytes]
    # Of the weights as they are stored.
    weights_sha256: str
    # Real source sentences to measure scales and the certificate on; may be empty.
    sample_lines: list[str]
    # What the reader has to tell of a checkpoint that can be read, a line each.
    warnings: tuple[str, ...] = ()


class CheckpointReader(Protocol):
    """A format that checkpoints come in."""

    @property
    def description(self) -> str:
        """What such a file is or directory holds, for the one whose checkpoint was not recognized."""

    def recognizes(self, path: Path) -> bool:
        """Whether the file or directory claims to be of this format; cheap, and raises nothing."""

    def read(self, path: Path) -> Checkpoint:
        """Read it; raises CheckpointError with every fault."""


def shared_names(config: ModelConfig) -> dict[str, str]:
    """Names of shared matrices that are not their own: such a name -> the name that the matrix goes by."""
    shared = {}
    if config.share_embeddings:
        shared[_SOURCE_EMBEDDING] = _TARGET_EMBEDDING
    if config.tie_output:
        shared[_OUTPUT] = _TARGET_EMBEDDING
    return shared


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this architecture."""
    with torch.device("meta"):  # shapes without memory
        state = Transformer(config).state_dict()
    shared = shared_names(config)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in shared}


def tensor_faults(config: ModelConfig, tensors: Mapping[str, Tensor], file_names: Mapping[str, str] | None = None) -> list[str]:
    """Every tensor that is missing, extra, misshapen, of another type or not finite; empty when all is well.

    Args:
        config: the architecture.
        tensors: by the names above.
        file_names: how the checkpoint's file calls tensors, where it has other names; faults are told by these.
    """
    names = file_names or {}
    expected = expected_shapes(config)
    shared = shared_names(config)
    faults = [
        f"{names.get(name, name)}: missing, expected {list(shape)}" for name, shape in expected.items() if name not in tensors
    ]
    for name, tensor in tensors.items():
        found = list(tensor.shape)
        called = names.get(name, name)
        if name in shared:
            faults.append(f"{called}: extra {found}; it is shared, and stored as {names.get(shared[name], shared[name])} only")
        elif name not in expected:
            faults.append(f"{called}: extra {found}")
        elif tuple(found) != expected[name]:
            faults.append(f"{called}: shape {found}, expected {list(expected[name])}")
        elif tensor.dtype not in _DTYPES:
            faults.append(f"{called}: of type {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
        elif bad := not_finite(tensor):
            faults.append(f"{called}: {bad} of {tensor.numel()} values are not finite")
    return faults


def not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are infinite or no numbers."""
    if tensor.dim() == 0:
        return int(not tensor.isfinite())
    rows = max(1, _VALUES_AT_ONCE * tensor.shape[0] // max(1, tensor.numel()))
    parts: Iterable[Tensor] = torch.split(tensor, rows)
    return sum(int((~part.isfinite()).sum()) for part in parts)


def alignment(
    layer: int, heads: int, *, num_layers: int, num_heads: int, faults: list[str], prefix: str = ""
) -> tuple[int, int | None]:
    """``alignment_layer`` and ``alignment_heads`` of ``ModelConfig``, as other tools state them.

    Args:
        layer: counted from the end where it is below 0.
        heads: 0: all.
        num_layers: of the decoder.
        num_heads: of each.
        faults: where it goes that there is no such layer, or that there are not so many heads.
        prefix: of their names in the format.
    """
    if not -num_layers <= layer < num_layers:
        faults.append(f"{prefix}alignment_layer: there is no layer {layer} of {num_layers}")
    if not 0 <= heads <= num_heads:
        faults.append(f"{prefix}alignment_heads: there are {num_heads}, not {heads}")
    return layer % num_layers, heads or None


def build_model(checkpoint: Checkpoint) -> Transformer:
    """The module with the checkpoint's weights: float32, on the CPU, in evaluation mode.

    The weights are the checkpoint's tensors themselves, which a file's own pages may hold, and no copies of them.

    Raises:
        CheckpointError: naming every tensor that is missing, extra, misshapen or not finite.
    """
    if faults := tensor_faults(checkpoint.config, checkpoint.tensors):
        raise CheckpointError(checkpoint.name, faults)
    shared = shared_names(checkpoint.config)
    with torch.device("meta"):  # no memory for weights that are not these
        model = Transformer(checkpoint.config)
    tensors = {name: tensor.to(torch.float32) for name, tensor in checkpoint.tensors.items()}
    tensors |= {name: tensors[own] for name, own in shared.items()}
    model.load_state_dict(tensors, assign=True)
    if checkpoint.config.tie_output:
        model.output.weight = model.decoder.embedding.tokens.weight
    if checkpoint.config.positions not in ("learned", "relative"):
        for side in (model.encoder, model.decoder):
            side.embedding.position_table = computed_positions(checkpoint.config)
    return model.eval()


def with_languages(checkpoint: Checkpoint, languages: Sequence[LanguagePair]) -> Checkpoint:
    """The same with what it translates from and into, where the user says so and its files need not.

    Raises:
        CheckpointError: the model is told its languages by tokens, and has none for one of these.
    """
    if (told := checkpoint.language_tokens) is not None:
        needed = {code for pair in languages for code in told.needed(pair.source, pair.target)}
        if unknown := sorted(needed - told.tokens.keys()):
            raise CheckpointError(checkpoint.name, [f"languages: the model has no token for {', '.join(map(repr, unknown))}"])
    return replace(checkpoint, languages=list(languages))


def read_samples(directory: Path, faults: list[str]) -> list[str]:
    """The lines of ``samples.txt`` that are not blank; none when there is no such file. A fault goes to ``faults``."""
    try:
        text = (directory / SAMPLES_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{SAMPLES_NAME}: cannot be read: {error}")
        return []
    # Not splitlines(): it would cut at characters that are part of a sentence.
    return [line for line in text.split("\n") if line.strip()]
