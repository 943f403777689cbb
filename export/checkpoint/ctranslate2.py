"""CTranslate2's model directories: what its converters write, whatever the model came from.

A directory with ``model.bin`` (``ctranslate2_binary.py``), vocabularies (``shared_vocabulary`` or ``source_vocabulary`` and
``target_vocabulary``, ``.json`` or one token a line in ``.txt``) and, since binary version 6, ``config.json``. Has no tokenizer:
where one lies beside it under a usual name (``vocabulary.py``) it is taken, otherwise a bundle takes and gives tokens with spaces
between them. Knows what belongs together; does not know variables (``ctranslate2_weights.py``), tokens
(``ctranslate2_tokens.py``) or what a checkpoint becomes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from export.checkpoint.base import Checkpoint, read_samples, shared_names, tensor_faults
from export.checkpoint.ctranslate2_binary import ModelBinary, read_binary
from export.checkpoint.ctranslate2_legacy import LEGACY_HEADS, LEGACY_REVISIONS, renamed
from export.checkpoint.ctranslate2_tokens import TokenConfig, Tokens, number_tokens, ordered, read_config, read_vocabularies
from export.checkpoint.ctranslate2_weights import Settings, read_positions, read_settings, read_tensors
from export.checkpoint.marian_binary import is_marian_binary
from export.checkpoint.vocabulary import choose_tokenizer
from export.model import ModelConfig
from serving.errors import CheckpointError
from serving.manifest import MosesSpec, field_faults

BINARY_NAME = "model.bin"
_SPEC = "TransformerSpec"
_SPEC_REVISIONS = {_SPEC: range(3, 8), **dict.fromkeys(LEGACY_HEADS, LEGACY_REVISIONS)}
# What it is where config.json does not say.
_LAYER_NORM_EPS = 1e-5
# Further names by which SentencePiece models of source and target lie beside a model.
_SENTENCEPIECE_NAMES = (
    ("source.model", "target.model"),
    ("src.spm", "tgt.spm"),
    *((name, name) for name in ("spiece.model", "tokenizer.model", "flores200_sacrebleu_tokenizer_spm.model")),
)
_EMBEDDINGS = {"encoder.embedding.tokens.weight": "source", "decoder.embedding.tokens.weight": "target"}
_OUTPUTS = ("output.weight", "output.bias")


class CTranslate2Reader:
    """Reads this format; see ``CheckpointReader``."""

    description = f"CTranslate2 ({BINARY_NAME}, vocabularies, config.json; a tokenizer's files if they lie beside it)"

    def recognizes(self, path: Path) -> bool:
        """Whether it is a directory with a ``model.bin``, none of Marian's; whether it is one of CTranslate2, ``read`` tells."""
        return (path / BINARY_NAME).is_file() and not is_marian_binary(path / BINARY_NAME)

    def read(self, path: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault.
        """
        return read_directory(path)


def read_directory(
    directory: Path,
    *,
    tokenizer_directory: Path | None = None,
    codes: tuple[str, ...] = (),
    moses: MosesSpec | None = None,
    target_prefix: str | None = None,
) -> Checkpoint:
    """Read a model directory.

    Args:
        directory: with ``model.bin``.
        tokenizer_directory: where the tokenizer's files are; in the same directory if not said otherwise.
        codes: names of byte-pair codes to look for before the usual ones.
        moses: how words are cut where the tokenizer is one of byte-pair codes.
        target_prefix: a token that every target starts with.

    Raises:
        CheckpointError: with every fault.
    """
    faults: list[str] = []
    model = _open(directory, faults)
    if model is None:
        raise CheckpointError(directory, faults)
    config = read_config(directory, model, faults)
    settings, tensors, variables = _read_weights(model, faults)
    vocabularies = read_vocabularies(directory, faults)
    sample_lines = read_samples(directory, faults)
    # What is below needs all of the above.
    tokens = None
    if config is not None and settings is not None and vocabularies is not None:
        tokens = number_tokens(config, settings, *vocabularies, faults)
    if faults or config is None or settings is None or tokens is None:
        raise CheckpointError(directory, faults)
    tensors = _numbered(tensors, tokens)
    architecture = _architecture(config, settings, tokens, tensors, faults)
    if architecture is not None:
        for alias in shared_names(architecture):
            del tensors[alias]
        faults += [f"{BINARY_NAME}: {fault}" for fault in tensor_faults(architecture, tensors, variables)]
    if target_prefix is not None and target_prefix not in tokens.numbering.target:
        faults.append(f"target_prefix: {target_prefix!r} is not in the target vocabulary")
    tokenizer = choose_tokenizer(
        tokenizer_directory or directory,
        tokens.vocabularies,
        faults,
        sentencepiece=_SENTENCEPIECE_NAMES,
        codes=codes,
        moses=moses,
    )
    if faults or architecture is None or tokenizer is None:
        raise CheckpointError(directory, faults)
    return Checkpoint(
        name=directory.resolve().name,
        config=architecture,
        tensors=tensors,
        languages=[],
        language_tokens=tokens.language_tokens,
        source_prefix=tokens.source_prefix,
        source_ends_with_eos=tokens.source_ends_with_eos,
        target_prefix=() if target_prefix is None else (tokens.numbering.target.index(target_prefix),),
        tokenizer=tokenizer.spec,
        tokenizer_files=tokenizer.files,
        weights_sha256=model.sha256,
        sample_lines=sample_lines,
        warnings=tokenizer.warnings,
    )


def _open(directory: Path, faults: list[str]) -> ModelBinary | None:
    try:
        model = renamed(read_binary(directory / BINARY_NAME))
    except OSError as error:
        faults.append(f"{BINARY_NAME}: cannot be read: {error.strerror}")
        return None
    except ValueError as error:
        faults.append(f"{BINARY_NAME}: {error}")
        return None
    revisions = _SPEC_REVISIONS.get(model.spec)
    if revisions is None:
        faults.append(f"{BINARY_NAME}: is of the kind {model.spec!r}; only {_SPEC}, an encoder and a decoder, is supported")
    elif model.spec_revision not in revisions:
        known = f"{revisions.start} to {revisions.stop - 1}"
        faults.append(f"{BINARY_NAME}: revision {model.spec_revision} of {model.spec or _SPEC} is not supported, only {known}")
    return None if faults else model


def _read_weights(model: ModelBinary, faults: list[str]) -> tuple[Settings | None, dict[str, Tensor], dict[str, str]]:
    """Settings, tensors by our names with those of shared matrices, and the variable that each is from."""
    found: list[str] = []
    tensors: dict[str, Tensor] = {}
    variables: dict[str, str] = {}
    settings = read_settings(model, found)
    if settings is not None:
        tensors, variables = read_tensors(model, settings, found)
        tensors |= read_positions(model, settings, found)
    faults += [f"{BINARY_NAME}: {fault}" for fault in found]
    return settings, tensors, variables


def _numbered(tensors: dict[str, Tensor], tokens: Tokens) -> dict[str, Tensor]:
    """The same tensors with rows by our ids; what was one tensor still is."""
    numbering = tokens.numbering
    rows = {name: numbering.source_rows if side == "source" else numbering.target_rows for name, side in _EMBEDDINGS.items()}
    rows |= dict.fromkeys(_OUTPUTS, numbering.target_rows)
    return {name: ordered(tensor, rows[name]) if name in rows else tensor for name, tensor in tensors.items()}


def _architecture(
    config: TokenConfig, settings: Settings, tokens: Tokens, tensors: dict[str, Tensor], faults: list[str]
) -> ModelConfig | None:
    source, target, output = (tensors[name] for name in (*_EMBEDDINGS, "output.weight"))
    try:
        return ModelConfig(
            source_vocab_size=len(source),
            target_vocab_size=len(target),
            d_model=settings.d_model,
            num_heads=settings.num_heads,
            num_encoder_layers=settings.num_encoder_layers,
            num_decoder_layers=settings.num_decoder_layers,
            encoder_d_ff=settings.encoder_d_ff,
            decoder_d_ff=settings.decoder_d_ff,
            norm=settings.norm,
            activation=settings.activation,
            positions="learned",
            max_positions=len(tensors["encoder.embedding.position_table"]),
            output_bias=settings.output_bias,
            scale_embedding=settings.scale_embedding,
            share_embeddings=tokens.numbering.shared and torch.equal(source, target),
            tie_output=torch.equal(output, target),
            embedding_norm=settings.embedding_norm,
            layer_norm_eps=config.layer_norm_epsilon or _LAYER_NORM_EPS,
            alignment_layer=settings.alignment_layer,
            alignment_heads=settings.alignment_heads,
            pad_id=tokens.pad_id,
            eos_id=tokens.eos_id,
            decoder_start_id=tokens.decoder_start_id,
        )
    except ValidationError as error:
        faults += field_faults(error.errors())
        return None
