"""Marian's own models: what marian-nmt trains and OPUS-MT publishes.

A directory with the model (``model.npz`` or another ``.npz``, which has its settings inside as ``special:model.yml``), its
vocabularies (YAML: token -> id, one token a line, or SentencePiece models) and, as a rule, ``decoder.yml``, which names them; or
the ``.npz`` itself, with the others beside it. Where the vocabularies are no SentencePiece models, ``source.spm`` and
``target.spm`` (or byte-pair codes) cut the text. Knows what belongs together and the names of tensors; does not know settings
(``marian_npz_config.py``), files (``marian_npz_files.py``) or what a checkpoint becomes.

**Settings** that make the architecture are read, with Marian's defaults; those that would make one that this project's module has
no place for are refused, all at once. Dropout and the like are for training only. A bundle searches by default as marian-decoder
does with the same ``decoder.yml``: by ``normalize``, ``word-penalty`` and ``max-length-factor``, without unknown tokens unless
``allow-unk`` is there, with beams that shrink. How wide its beams were is recorded. An ensemble is refused.

**What Marian does its own way** (marian-dev: src/models/transformer.h, src/layers/generic.h, src/tensors/cpu): the decoder starts
from a vector of zeros instead of a token, for which a token without embedding is added here; positions are sines, then cosines,
with rates 10000^(-i / (d/2 - 1)), not 10000^(-i / (d/2)) as in the conversions of such models to Hugging Face and CTranslate2;
LayerNorm adds 1e-6; up to version 1.12.0 its ``gelu`` is x * sigmoid(1.702 x).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint.archives import file_sha256, read_npz
from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.hugging_face import rename
from export.checkpoint.marian_npz_config import MarianConfig, read_settings
from export.checkpoint.marian_npz_files import (
    DECODER_CONFIG_NAME,
    MODEL_NAME,
    cut_vocabularies,
    find_model,
    find_vocabularies,
    models_in,
    read_decoder_settings,
    read_languages,
    read_vocabularies,
    search_options,
    search_warnings,
)
from export.checkpoint.vocabulary import END_TOKEN, UNKNOWN_TOKEN, choose_tokenizer
from export.model import ModelConfig
from serving.errors import CheckpointError

# Marian has a table for any length; this is far beyond a sentence, and takes a few megabytes.
_MAX_POSITIONS = 1024
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}
_ATTENTIONS = {
    "encoder": {"self": "self_attention"},
    "decoder": {"self": "self_attention", "context": "cross_attention"},
}


class MarianNpzReader:
    """Reads this format; see ``CheckpointReader``."""

    description = f"Marian's own ({MODEL_NAME} with its vocabularies, and {DECODER_CONFIG_NAME} that names them; or the .npz)"

    def recognizes(self, path: Path) -> bool:
        """Whether it is an ``.npz``, or a directory that has one or that says so in ``decoder.yml``."""
        if path.is_dir():
            return (path / DECODER_CONFIG_NAME).is_file() or bool(models_in(path))
        return path.suffix == ".npz" and path.is_file()

    def read(self, path: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when settings and vocabularies are known.
        """
        faults: list[str] = []
        directory = path if path.is_dir() else path.parent
        decoder_settings = read_decoder_settings(path, faults)
        model_path = find_model(directory, decoder_settings, faults) if path.is_dir() else path
        vocabulary_paths = find_vocabularies(directory, decoder_settings, faults)
        vocabularies = read_vocabularies(vocabulary_paths, faults) if vocabulary_paths else None
        arrays = read_npz(model_path, faults) if model_path else {}
        settings = read_settings(model_path, arrays, faults) if model_path and arrays else None
        unknown_id = vocabularies.target.get(UNKNOWN_TOKEN) if vocabularies else None
        defaults, num_beams = search_options(decoder_settings, unknown_id, faults)
        sample_lines = read_samples(directory, faults)
        if model_path is None or settings is None or vocabularies is None:
            raise CheckpointError(path, faults)
        assert vocabulary_paths is not None, "these were read"
        vocabularies, cuts = cut_vocabularies(vocabularies, vocabulary_paths, settings.dim_vocabs)
        own_faults = vocabularies.faults(*settings.dim_vocabs)
        if not own_faults and vocabularies.source[END_TOKEN] != vocabularies.target[END_TOKEN]:
            own_faults.append(f"{END_TOKEN} has another id in the source vocabulary than in the target vocabulary")
        faults += own_faults
        if own_faults:
            raise CheckpointError(path, faults)
        config, tensors = _model(settings, arrays, vocabularies.target[END_TOKEN], model_path.name, faults)
        own_models = tuple(path.name for path in vocabulary_paths if path.suffix == ".spm")
        pairs = [(own_models[0], own_models[1])] if len(own_models) == 2 else []
        choice = choose_tokenizer(directory, vocabularies, faults, sentencepiece=pairs)
        if faults or choice is None:
            raise CheckpointError(path, faults)
        language_tokens = vocabularies.language_tokens()
        warnings = (*choice.warnings, *cuts, *search_warnings(decoder_settings))
        if config.norm == "pre":
            warnings = (
                *warnings,
                "transformer-preprocess: the norm is applied to all keys and values of the decoder's self-attention, as in "
                "training; marian-decoder leaves it out from the second token on, so that its translations differ",
            )
        return Checkpoint(
            name=directory.resolve().name if path.is_dir() else model_path.stem,
            config=config,
            tensors=tensors,
            languages=[] if language_tokens else read_languages(model_path),
            language_tokens=language_tokens,
            defaults=defaults,
            num_beams=num_beams,
            tokenizer=choice.spec,
            tokenizer_files=choice.files,
            weights_sha256=file_sha256(model_path),
            sample_lines=sample_lines,
            warnings=warnings,
        )


def position_table(num_positions: int, d_model: int) -> Tensor:
    """Marian's positions: sines, then cosines, of p * 10000^(-i / (d/2 - 1)), computed in float32 as Marian does.

    Returns:
        [num_positions, d_model] float32.
    """
    num_rates = d_model // 2
    increment = np.float32(math.log(10000.0)) / np.float32(num_rates - 1)
    rate = np.exp(np.arange(num_rates, dtype=np.float32) * -increment)
    angle = np.arange(num_positions, dtype=np.float32)[:, None] * rate  # [num_positions, d_model / 2]
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32))


def tensor_names(config: ModelConfig, *, legacy_output: bool = False) -> dict[str, str]:
    """Marian's name -> ours, of every tensor but the positions; a shared matrix has one.

    Args:
        config: the architecture.
        legacy_output: the output's matrix is called as in old versions.
    """
    names = dict(_layer_names(config))
    if config.share_embeddings:
        names["Wemb"] = "decoder.embedding.tokens.weight"
    else:
        names["decoder_Wemb"] = "decoder.embedding.tokens.weight"
        names["encoder_Wemb"] = "encoder.embedding.tokens.weight"
    if not config.tie_output:
        names["decoder_ff_logit_out_W" if legacy_output else "decoder_ff_logit_out_Wt"] = "output.weight"
    names["decoder_ff_logit_out_b"] = "output.bias"
    for side in ("encoder", "decoder"):
        if config.norm == "pre":
            names |= _norm_names(f"{side}_top", f"{side}.final_norm")
        if config.embedding_norm:
            names |= _norm_names(f"{side}_emb", f"{side}.embedding.norm", "_pre")
    return names


def _layer_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    suffix = "_pre" if config.norm == "pre" else ""
    for side, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        for i in range(depth):
            theirs, ours = f"{side}_l{i + 1}", f"{side}.layers.{i}"
            for kind, attention in _ATTENTIONS[side].items():
                for letter, projection in _PROJECTIONS.items():
                    yield f"{theirs}_{kind}_W{letter}", f"{ours}.{attention}.{projection}.weight"
                    yield f"{theirs}_{kind}_b{letter}", f"{ours}.{attention}.{projection}.bias"
                yield from _norm_names(f"{theirs}_{kind}_Wo", f"{ours}.{attention}_residual.norm", suffix).items()
            for number, product in (("1", "inner"), ("2", "outer")):
                yield f"{theirs}_ffn_W{number}", f"{ours}.feed_forward.{product}.weight"
                yield f"{theirs}_ffn_b{number}", f"{ours}.feed_forward.{product}.bias"
            yield from _norm_names(f"{theirs}_ffn_ffn", f"{ours}.feed_forward_residual.norm", suffix).items()


def _norm_names(theirs: str, ours: str, suffix: str = "") -> dict[str, str]:
    return {f"{theirs}_ln_scale{suffix}": f"{ours}.weight", f"{theirs}_ln_bias{suffix}": f"{ours}.bias"}


def _model(
    settings: MarianConfig, arrays: Mapping[str, NDArray[Any]], eos_id: int, file_name: str, faults: list[str]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and its tensors, with the start token; what is wrong with them goes to ``faults``."""
    trained = arrays.get("Wpos")
    # More rows than a table of positions ever has would only be a fault that leads astray.
    rows = trained.shape[-2] if trained is not None and trained.ndim >= 2 else _MAX_POSITIONS
    config = settings.architecture(eos_id, min(max(rows, 1), _MAX_POSITIONS), trained_positions=trained is not None)
    names = tensor_names(config, legacy_output="decoder_ff_logit_out_W" in arrays)
    stored = _untied({name: _tensor(name, array) for name, array in arrays.items()}, settings.transformer_tied_layers)
    computed = position_table(config.max_positions, config.d_model)
    table = computed if trained is None else stored.pop("Wpos")[: config.max_positions]
    for side, called in (("encoder", "Wpos"), ("decoder", "Wpos of the decoder")):
        stored[called] = table
        names[called] = f"{side}.embedding.position_table"
    if settings.output_omit_bias:
        stored.setdefault("decoder_ff_logit_out_b", torch.zeros(config.target_vocab_size))
    tensors = rename(config, stored, names, file_name, faults)
    if not tensors:
        return config, {}
    return _with_start_token(config, tensors)


def _untied(stored: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The same with tensors of their own for decoder layers that have those of others; ``layers``: of each, whose."""
    if not layers:
        return stored
    found = {name: tensor for name, tensor in stored.items() if not name.startswith("decoder_l")}
    for i, own in enumerate(layers, start=1):
        prefix = f"decoder_l{own}_"
        found |= {f"decoder_l{i}_{name[len(prefix) :]}": tensor for name, tensor in stored.items() if name.startswith(prefix)}
    return found


def _tensor(name: str, array: NDArray[Any]) -> Tensor:
    """A tensor as the module has it: a product's matrix is stored as [in, out], a vector as [1, size]."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    # A type that torch has not is told of as any other wrong one.
    tensor = torch.from_numpy(array) if array.dtype.kind in "fiub" else torch.zeros(array.shape, dtype=torch.complex64)
    if tensor.dim() == 2 and tensor.shape[0] == 1 and ("_b" in name or "_ln_" in name):
        return tensor[0]
    is_product = "_W" in name and not name.endswith(("_Wt", "_Wemb"))
    return tensor.T.contiguous() if is_product and tensor.dim() == 2 and "_ln_" not in name else tensor


def _with_start_token(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same with one more target token, whose embedding is zero: what Marian's decoder starts from. It is never decoded."""
    size = config.target_vocab_size
    for name in ("decoder.embedding.tokens.weight", "output.weight", "output.bias"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], torch.zeros_like(tensors[name][:1])])
    sizes = {"target_vocab_size": size + 1, "decoder_start_id": size}
    if config.share_embeddings:
        sizes["source_vocab_size"] = size + 1
    return ModelConfig(**{**config.model_dump(), **sizes}), tensors
