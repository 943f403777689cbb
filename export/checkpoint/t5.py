"""Hugging Face's T5 and mT5 directories, which Flan-T5's and MADLAD-400's are too.

A directory with ``config.json`` (``"model_type": "t5"`` or ``"mt5"``), the weights and ``spiece.model``; some have
``tokenizer_config.json``, ``generation_config.json`` and ``samples.txt``. Knows their fields, the names of their tensors and what
of SentencePiece's model becomes which token; does not know what a checkpoint becomes.

**Scales.** T5 does not divide scores by sqrt(d_k): its queries are multiplied by as much here. T5 1.0 multiplies the decoder's
last states by d_model^-0.5: here their norm is. mT5 never does, whatever its ``tie_word_embeddings`` says, and whether there is
an output projection of its own is told by the weights: newer versions of the library write that all are tied.

**Vocabulary.** What a model has beyond the pieces, or at their end, are sentinels (``<extra_id_0>``), which stand for gaps in the
texts of its training, and padding to a round number. No translation has them, and they are left out.

**Languages.** MADLAD-400 has pieces like ``<2de>``, by which a source tells the language to translate into. SentencePiece makes
them of such text wherever it is; in the model that is written here they are control symbols, which no text makes. Where
SentencePiece puts a piece for a space before one, sources have it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import sentencepiece
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from export.checkpoint.bart_config import Depth, Length, Size, TokenId
from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.generation import GenerationSettings, read_generation
from export.checkpoint.hugging_face import (
    ACTIVATIONS,
    CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    added_tokens,
    is_of_type,
    one_of,
    read_json,
    read_weights,
    rename,
    setting_faults,
)
from export.model import Activation, ModelConfig
from serving.bundle import DefaultOptions, LanguageTokens, TokenizerSpec, field_faults
from serving.errors import CheckpointError
from serving.tokenizers import open_tokenizer

SENTENCEPIECE_NAME = "spiece.model"

_MODEL_TYPES = ("t5", "mt5")
# Of models that do not say how long their texts may be: what they were trained on.
_MAX_POSITIONS = 512
_GATED = "gated-"
# Fields that make another model, and the values with which they do not.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "is_decoder": (False, None),
    "is_encoder_decoder": (True, None),
    "pruned_heads": (None, {}),
    "quantization_config": (None, {}),
}
_TOKENIZER_CLASSES = tuple(f"{family}Tokenizer{fast}" for family in ("T5", "MT5") for fast in ("", "Fast"))
_SENTINEL = re.compile("\u2581?<extra_id_[0-9]+>")
_LANGUAGE = re.compile(r"<2(\w[\w-]*)>")
_OUTPUT = "lm_head.weight"
# One matrix; a file has it by any of these names.
_EMBEDDINGS = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
# Rows of these are tokens.
_TOKENS = ("decoder.embedding.tokens.weight", "output.weight")
# In T5's files of older versions; nothing reads it.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}
_ATTENTIONS = {
    "encoder": (("SelfAttention", "self_attention"),),
    "decoder": (("SelfAttention", "self_attention"), ("EncDecAttention", "cross_attention")),
}
_CONTROL = 3  # of SentencePiece's types of pieces


class _T5Config(BaseModel):
    """The fields of ``config.json`` that make the architecture, with the defaults of ``T5Config``."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model_type: Literal["t5", "mt5"]
    vocab_size: Size = 32128
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Depth = 6
    num_decoder_layers: Depth | None = None
    num_heads: Size = 8
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=2**16, multiple_of=4)] = 32
    relative_attention_max_distance: Length = 128
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    feed_forward_proj: str = "relu"
    n_positions: Length = _MAX_POSITIONS
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    pad_token_id: TokenId = 0
    eos_token_id: Annotated[TokenId, BeforeValidator(one_of)] = 1
    decoder_start_token_id: TokenId = 0

    @property
    def activation(self) -> Activation | None:
        """Of the feed-forward networks; None where there is none such."""
        # The library's own exception: what was called so from the start is the approximation.
        return "gelu_tanh" if self.feed_forward_proj == f"{_GATED}gelu" else ACTIVATIONS.get(self._activation_name)

    @property
    def _activation_name(self) -> str:
        return self.feed_forward_proj.removeprefix(_GATED)

    @property
    def scales_states(self) -> bool:
        """Whether the decoder's last states are multiplied by d_model^-0.5."""
        stated = self.scale_decoder_outputs
        return self.model_type == "t5" and (self.tie_word_embeddings if stated is None else stated)

    def architecture_faults(self) -> list[str]:
        """Every field whose value contradicts another, or is one that this project's module has no place for."""
        faults = []
        if self.activation is None:
            supported = " or ".join(map(repr, ACTIVATIONS))
            faults.append(
                f"feed_forward_proj: {self.feed_forward_proj!r} is not supported, only {supported}, and these after {_GATED!r}"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            faults.append(
                f"relative_attention_max_distance: {self.relative_attention_max_distance} is no more than half of "
                f"relative_attention_num_buckets {self.relative_attention_num_buckets}"
            )
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if getattr(self, name) >= self.vocab_size:
                faults.append(f"{name}: {getattr(self, name)} is outside a vocabulary of {self.vocab_size}")
        return faults

    def architecture(self) -> ModelConfig:
        """The same for ``Transformer``, its output tied; only where there are no faults."""
        assert self.activation is not None
        return ModelConfig(
            source_vocab_size=self.vocab_size,
            target_vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_heads=self.num_heads,
            d_head=self.d_kv,
            num_encoder_layers=self.num_layers,
            num_decoder_layers=self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers,
            encoder_d_ff=self.d_ff,
            decoder_d_ff=self.d_ff,
            norm="pre",
            norm_kind="rms",
            activation=self.activation,
            gated=self.feed_forward_proj.startswith(_GATED),
            positions="relative",
            relative_buckets=self.relative_attention_num_buckets,
            relative_distance=self.relative_attention_max_distance,
            max_positions=self.n_positions,
            bias=False,
            scale_embedding=False,
            layer_norm_eps=self.layer_norm_epsilon,
            pad_id=self.pad_token_id,
            eos_id=self.eos_token_id,
            decoder_start_id=self.decoder_start_token_id,
        )


class _MT5Config(_T5Config):
    """With the defaults of ``MT5Config``."""

    vocab_size: Size = 250112
    d_ff: Size = 1024
    num_layers: Depth = 8
    num_heads: Size = 6
    feed_forward_proj: str = "gated-gelu"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """What becomes of a SentencePiece model."""

    # A model whose languages are control symbols, and which has no sentinels at its end.
    model: bytes
    size: int
    # Language code -> its piece.
    languages: dict[str, int]
    # What SentencePiece puts before the piece of a language.
    before_language: tuple[int, ...]
    end_id: int


class T5Reader:
    """Reads this format; see ``CheckpointReader``."""

    description = f'Hugging Face T5 or mT5 ({CONFIG_NAME} with "model_type": "t5" or "mt5", weights, {SENTENCEPIECE_NAME})'

    def recognizes(self, directory: Path) -> bool:
        """Whether ``config.json`` states either type; a broken one that mentions it is told what is wrong by ``read``."""
        return any(is_of_type(directory, model_type) for model_type in _MODEL_TYPES)

    def read(self, directory: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when the architecture is known.
        """
        faults: list[str] = []
        document = read_json(directory / CONFIG_NAME, faults) or {}
        generation = read_generation(directory, document, faults)
        fields = _read_fields(document, generation, faults)
        settings = read_json(directory / TOKENIZER_CONFIG_NAME, faults) or {}
        faults += [f"{TOKENIZER_CONFIG_NAME}: {fault}" for fault in _tokenizer_faults(settings)]
        pieces = _read_pieces(directory, settings, faults)
        stored, weights_sha256, weights_name = read_weights(directory, faults)
        config = None if fields is None else _with_output(fields.architecture(), stored)
        forced = generation.forced_start(config, faults) if config else None
        target_prefix = () if forced is None else (forced,)
        defaults = generation.defaults(config, hidden_tokens=len(target_prefix), faults=faults) if config else DefaultOptions()
        tensors = _tensors(config, stored, weights_name, faults) if config and stored else {}
        sample_lines = read_samples(directory, faults)
        if pieces and config:
            config = _cut(config, tensors, pieces, faults)
        if faults or fields is None or config is None or pieces is None:
            raise CheckpointError(directory, faults)
        _scale(fields, tensors)
        languages = pieces.languages
        return Checkpoint(
            name=directory.resolve().name,
            config=config,
            tensors=tensors,
            languages=[],
            language_tokens=LanguageTokens(tokens=languages, before_source="target", before_target=False) if languages else None,
            source_prefix=pieces.before_language,
            target_prefix=target_prefix,
            defaults=_of_pieces(defaults, pieces.size),
            num_beams=generation.num_beams,
            tokenizer=TokenizerSpec(kind="sentencepiece", source_model=SENTENCEPIECE_NAME, target_model=SENTENCEPIECE_NAME),
            tokenizer_files={SENTENCEPIECE_NAME: pieces.model},
            weights_sha256=weights_sha256,
            sample_lines=sample_lines,
            warnings=(*generation.warnings, *_warnings(document)),
        )


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """T5's name -> ours, of every tensor; the shared embedding has several."""
    shared = {**dict.fromkeys(_EMBEDDINGS, "decoder.embedding.tokens.weight"), _OUTPUT: "output.weight"}
    return shared | {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _parameter_names(config)}


def _parameter_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(T5's name, ours) of every tensor but those of tokens, without ``.weight``."""
    inner = {"wi_0": "inner", "wi_1": "factor"} if config.gated else {"wi": "inner"}
    for side, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        yield f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{side}.relative_positions.buckets"
        for i in range(depth):
            theirs, ours = f"{side}.block.{i}.layer", f"{side}.layers.{i}"
            attentions = _ATTENTIONS[side]
            for at, (attn, attention) in enumerate(attentions):
                for proj, projection in _PROJECTIONS.items():
                    yield f"{theirs}.{at}.{attn}.{proj}", f"{ours}.{attention}.{projection}"
                yield f"{theirs}.{at}.layer_norm", f"{ours}.{attention}_residual.norm"
            last = len(attentions)
            for product, linear in (*inner.items(), ("wo", "outer")):
                yield f"{theirs}.{last}.DenseReluDense.{product}", f"{ours}.feed_forward.{linear}"
            yield f"{theirs}.{last}.layer_norm", f"{ours}.feed_forward_residual.norm"
        yield f"{side}.final_layer_norm", f"{side}.final_norm"


def _read_fields(document: dict[str, Any], generation: GenerationSettings, faults: list[str]) -> _T5Config | None:
    """The fields of the architecture; None when it cannot be known. All that is unsupported goes to ``faults``."""
    if not document:
        return None
    found = setting_faults(document, _ONLY)
    kind = _MT5Config if document.get("model_type") == "mt5" else _T5Config
    # null is as good as nothing where a field has a default.
    given = {name: value for name, value in {**document, **generation.start(has_default=True)}.items() if value is not None}
    fields = None
    try:
        fields = kind.model_validate(given)
        found += (unsupported := fields.architecture_faults())
        fields = None if unsupported else fields
    except ValidationError as error:
        found += field_faults(error.errors())
    faults += [f"{CONFIG_NAME}: {fault}" for fault in found]
    return fields


def _tokenizer_faults(settings: Mapping[str, Any]) -> list[str]:
    supported: dict[str, tuple[Any, ...]] = {"tokenizer_class": (*_TOKENIZER_CLASSES, None), "sp_model_kwargs": (None, {})}
    return setting_faults(settings, supported)


def _read_pieces(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> _Pieces | None:
    """What becomes of ``spiece.model``; None after a fault."""
    path = directory / SENTENCEPIECE_NAME
    try:
        serialized = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        model = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]  # made at import
    except FileNotFoundError:
        fault = f"{SENTENCEPIECE_NAME}: is missing"
        if (directory / TOKENIZER_NAME).exists():
            fault += f"; {TOKENIZER_NAME} is not read in its place: put the model's SentencePiece file there"
        faults.append(fault)
        return None
    except (OSError, RuntimeError) as error:
        faults.append(f"{SENTENCEPIECE_NAME}: is no SentencePiece model: {error}")
        return None
    while model.pieces and _SENTINEL.fullmatch(model.pieces[-1].piece):
        del model.pieces[-1]
    languages = {}
    for i, piece in enumerate(model.pieces):
        if language := _LANGUAGE.fullmatch(piece.piece):
            languages[language[1]] = i
        if language or _SENTINEL.fullmatch(piece.piece):
            piece.type = _CONTROL
    size, known = len(model.pieces), {piece.piece for piece in model.pieces}
    faults += [
        f"added token {token!r} with id {token_id}: is not supported; {SENTENCEPIECE_NAME} has no such piece"
        for token, token_id in added_tokens(directory, settings, faults).items()
        if token not in known and not _SENTINEL.fullmatch(token)
    ]
    return _Pieces(
        model=model.SerializeToString(),
        size=size,
        languages=languages,
        before_language=_before_language(processor, languages),
        end_id=processor.eos_id(),
    )


def _before_language(processor: sentencepiece.SentencePieceProcessor, languages: Mapping[str, int]) -> tuple[int, ...]:
    """What SentencePiece puts before the piece of a language at the beginning of a text; nothing where it makes none of text."""
    for code, token_id in languages.items():
        ids: list[int] = processor.encode(f"<2{code}> a")
        return tuple(ids[: ids.index(token_id)]) if token_id in ids else ()
    return ()


def _with_output(config: ModelConfig, stored: Mapping[str, Tensor]) -> ModelConfig:
    """With an output projection of its own where the weights have one."""
    output, embedding = stored.get(_OUTPUT), next((stored[name] for name in _EMBEDDINGS if name in stored), None)
    is_tied = output is None or embedding is None or (output.shape == embedding.shape and bool((output == embedding).all()))
    return config.model_copy(update={"tie_output": is_tied})


def _tensors(config: ModelConfig, stored: Mapping[str, Tensor], file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """Tensors by our names; what is wrong with them goes to ``faults``."""
    tensors = {name: tensor for name, tensor in stored.items() if name != _UNUSED}
    return rename(config, tensors, tensor_names(config), file_name, faults)


def _cut(config: ModelConfig, tensors: dict[str, Tensor], pieces: _Pieces, faults: list[str]) -> ModelConfig:
    """The architecture with as many tokens as there are pieces, and ``tensors`` likewise."""
    size = pieces.size
    if pieces.end_id != config.eos_id:
        faults.append(f"{SENTENCEPIECE_NAME}: </s> has id {pieces.end_id}, the model's end-of-sentence token is {config.eos_id}")
    if size > config.target_vocab_size:
        faults.append(f"{SENTENCEPIECE_NAME}: has {size} pieces, the vocabulary is of {config.target_vocab_size}")
        return config
    for name in ("pad_id", "eos_id", "decoder_start_id"):
        if getattr(config, name) >= size:
            faults.append(f"{name.replace('_id', '_token_id')}: {getattr(config, name)} is none of {size} pieces")
    try:
        open_tokenizer(
            TokenizerSpec(kind="sentencepiece", source_model=SENTENCEPIECE_NAME, target_model=SENTENCEPIECE_NAME),
            {SENTENCEPIECE_NAME: pieces.model},
        )
    except ValueError as error:
        faults.append(str(error))
    for name in _TOKENS:
        if name in tensors:
            tensors[name] = tensors[name][:size].clone()
    return config.model_copy(update={"source_vocab_size": size, "target_vocab_size": size})


def _of_pieces(defaults: DefaultOptions, size: int) -> DefaultOptions:
    """The same without what forbids tokens that are left out."""
    suppressed = [sequence for sequence in defaults.suppressed if max(sequence) < size]
    return defaults.model_copy(update={"suppressed": suppressed})


def _scale(fields: _T5Config, tensors: dict[str, Tensor]) -> None:
    """Fold T5's scales into weights."""
    for name in tensors:
        if name.endswith("_attention.query.weight"):
            tensors[name] = tensors[name] * math.sqrt(fields.d_kv)
    if fields.scales_states:
        tensors["decoder.final_norm.weight"] = tensors["decoder.final_norm.weight"] / math.sqrt(fields.d_model)


def _warnings(document: Mapping[str, Any]) -> Iterator[str]:
    """That sources want words in front by which the model knows its task."""
    tasks = document.get("task_specific_params")
    prefixes = [task.get("prefix") for task in tasks.values() if isinstance(task, dict)] if isinstance(tasks, dict) else []
    if told := [prefix for prefix in prefixes if isinstance(prefix, str) and "translate" in prefix]:
        yield (
            f"the model was told its task by words before a source, {told[0]!r} for one; a bundle has those of --source-prefix"
        )
