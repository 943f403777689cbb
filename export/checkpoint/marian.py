"""Hugging Face's Marian directories: what OPUS-MT models come in.

A directory with ``config.json`` (``"model_type": "marian"``), the weights, ``source.spm``, ``target.spm`` and ``vocab.json``;
some have ``target_vocab.json``, ``tokenizer_config.json``, ``generation_config.json`` and ``samples.txt`` (real source sentences,
one a line, to measure on). Knows their fields and the names of Marian's tensors; does not know what a checkpoint becomes.

**Fields.** What ``MarianMTModel`` reads is read, with its defaults. Fields by which older versions, or the family that Marian's
configuration came from, changed the architecture must have Marian's values. Any other field is ignored: ``MarianMTModel`` has no
use for it, not even for ``extra_pos_embeddings``, where old versions wrote one more than the padding's id. Dropout and the like
are for training only.

**Languages** are ``source_lang`` and ``target_lang`` of ``tokenizer_config.json``. Where one is missing the bundle states no
languages, and takes requests that name none. A model of
several target languages has a token for each (``>>deu<<``), which goes before its sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.generation import GenerationSettings, read_generation
from export.checkpoint.hugging_face import (
    ACTIVATIONS,
    CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    first_of,
    is_of_type,
    read_json,
    read_weights,
    rename,
    setting_faults,
    token_text,
)
from export.model import Depth, Heads, Length, ModelConfig, Size
from serving.errors import CheckpointError
from serving.manifest import DefaultOptions, LanguagePair, LanguageTokens, MarianTokenizerSpec, field_faults
from serving.tokenizers.marian import MarianTokenizer

SOURCE_MODEL_NAME = "source.spm"
TARGET_MODEL_NAME = "target.spm"
VOCABULARY_NAME = "vocab.json"
TARGET_VOCABULARY_NAME = "target_vocab.json"

# Fields that change a model of a sibling family or an older version, and the values with which it is Marian's.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "add_final_layer_norm": (False, None),
    "auto_map": (None, {}),
    "do_blenderbot_90_layernorm": (False, None),
    "force_bos_token_to_be_generated": (False, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (True, None),
    "normalize_before": (False, None),
    "normalize_embedding": (False, None),
    "pruned_heads": (None, {}),
    "quantization_config": (None, {}),
    "static_position_embeddings": (True, None),
}
_TOKENS: Mapping[str, tuple[Any, ...]] = {"eos_token": ("</s>",), "unk_token": ("<unk>",)}
_EMBEDDINGS = {
    "model.shared.weight": "decoder.embedding.tokens.weight",
    "model.decoder.embed_tokens.weight": "decoder.embedding.tokens.weight",
    "model.encoder.embed_tokens.weight": "encoder.embedding.tokens.weight",
    "lm_head.weight": "output.weight",
}
_BIAS = "final_logits_bias"
_POSITIONS = tuple(f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder"))
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
_ATTENTIONS = {
    "encoder": {"self_attn": "self_attention"},
    "decoder": {"self_attn": "self_attention", "encoder_attn": "cross_attention"},
}

_TokenId = Annotated[int, Field(ge=0)]


class _MarianConfig(BaseModel):
    """The fields of ``config.json`` that make the architecture, with the defaults of ``MarianConfig``."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model_type: Literal["marian"]
    vocab_size: Size = 58101
    decoder_vocab_size: Size | None = None
    max_position_embeddings: Length = 1024
    encoder_layers: Depth = 12
    encoder_ffn_dim: Size = 4096
    encoder_attention_heads: Heads = 16
    decoder_layers: Depth = 12
    decoder_ffn_dim: Size = 4096
    decoder_attention_heads: Heads = 16
    activation_function: str = "gelu"
    d_model: Size = 1024
    decoder_start_token_id: _TokenId = 58100
    scale_embedding: bool = False
    pad_token_id: _TokenId = 58100
    eos_token_id: Annotated[_TokenId, BeforeValidator(first_of)] = 0
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True

    @property
    def target_vocab_size(self) -> int:
        """Marian does not look at the decoder's own size where embeddings are shared."""
        if self.share_encoder_decoder_embeddings:
            return self.vocab_size
        return self.decoder_vocab_size or self.vocab_size

    def architecture_faults(self) -> list[str]:
        """Every field whose value contradicts another, or is one that this project's module has no place for."""
        faults = []
        if self.activation_function not in ACTIVATIONS:
            faults.append(
                f"activation_function: {self.activation_function!r} is not supported, only {' or '.join(map(repr, ACTIVATIONS))}"
            )
        if self.encoder_attention_heads != self.decoder_attention_heads:
            faults.append(
                f"encoder_attention_heads, decoder_attention_heads: {self.encoder_attention_heads} and "
                f"{self.decoder_attention_heads}; different numbers are not supported"
            )
        if self.d_model % self.encoder_attention_heads or self.d_model % 2:
            faults.append(
                f"d_model: {self.d_model} is no multiple of 2 and of encoder_attention_heads {self.encoder_attention_heads}"
            )
        smaller = min(self.vocab_size, self.target_vocab_size)
        for name, token_id, size in (
            ("pad_token_id", self.pad_token_id, smaller),
            ("eos_token_id", self.eos_token_id, smaller),
            ("decoder_start_token_id", self.decoder_start_token_id, self.target_vocab_size),
        ):
            if token_id >= size:
                faults.append(f"{name}: {token_id} is outside a vocabulary of {size}")
        return faults

    def architecture(self) -> ModelConfig:
        """The same for ``Transformer``; only where there are no faults."""
        return ModelConfig(
            source_vocab_size=self.vocab_size,
            target_vocab_size=self.target_vocab_size,
            d_model=self.d_model,
            num_heads=self.encoder_attention_heads,
            num_encoder_layers=self.encoder_layers,
            num_decoder_layers=self.decoder_layers,
            encoder_d_ff=self.encoder_ffn_dim,
            decoder_d_ff=self.decoder_ffn_dim,
            norm="post",
            activation=ACTIVATIONS[self.activation_function],
            positions="sinusoidal_concatenated",
            max_positions=self.max_position_embeddings,
            output_bias=True,
            scale_embedding=self.scale_embedding,
            share_embeddings=self.share_encoder_decoder_embeddings,
            tie_output=self.tie_word_embeddings,
            layer_norm_eps=1e-5,
            pad_id=self.pad_token_id,
            eos_id=self.eos_token_id,
            decoder_start_id=self.decoder_start_token_id,
        )


class MarianReader:
    """Reads this format; see ``CheckpointReader``."""

    description = (
        f'Hugging Face Marian ({CONFIG_NAME} with "model_type": "marian", weights, {SOURCE_MODEL_NAME}, {VOCABULARY_NAME})'
    )

    def recognizes(self, directory: Path) -> bool:
        """Whether ``config.json`` states Marian's type; a broken one that mentions it is told what is wrong by ``read``."""
        return is_of_type(directory, "marian")

    def read(self, directory: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when the architecture is known.
        """
        faults: list[str] = []
        document = read_json(directory / CONFIG_NAME, faults)
        generation = read_generation(directory, document, faults)
        config = None if document is None else _read_config(document, generation, faults)
        forced = generation.forced_start(config, faults) if config else None
        target_prefix = () if forced is None else (forced,)
        defaults = generation.defaults(config, hidden_tokens=len(target_prefix), faults=faults) if config else DefaultOptions()
        settings = read_json(directory / TOKENIZER_CONFIG_NAME, faults) or {}
        spec = _tokenizer_spec(directory, settings, faults)
        tokenizer_files: dict[str, Path | bytes] = {name: directory / name for name in spec.file_names}
        tokenizer = _open_tokenizer(spec, tokenizer_files, config, faults)
        stored, weights_sha256, weights_name = read_weights(directory, faults)
        tensors = _tensors(config, stored, weights_name, faults) if config and stored else {}
        sample_lines = read_samples(directory, faults)
        if faults or config is None or tokenizer is None:
            raise CheckpointError(directory, faults)
        language_tokens = _language_tokens(tokenizer.language_tokens)
        return Checkpoint(
            name=directory.resolve().name,
            config=config,
            tensors=tensors,
            languages=[] if language_tokens else _languages(settings),
            language_tokens=language_tokens,
            target_prefix=target_prefix,
            defaults=defaults,
            num_beams=generation.num_beams,
            tokenizer=spec,
            tokenizer_files=tokenizer_files,
            weights_sha256=weights_sha256,
            sample_lines=sample_lines,
            warnings=generation.warnings,
        )


def parameter_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(Marian's name, ours) of every projection and norm, without ``.weight`` and ``.bias``."""
    for side, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        for i in range(depth):
            theirs, ours = f"model.{side}.layers.{i}", f"{side}.layers.{i}"
            for attn, attention in _ATTENTIONS[side].items():
                for proj, projection in _PROJECTIONS.items():
                    yield f"{theirs}.{attn}.{proj}", f"{ours}.{attention}.{projection}"
                yield f"{theirs}.{attn}_layer_norm", f"{ours}.{attention}_residual.norm"
            yield f"{theirs}.fc1", f"{ours}.feed_forward.inner"
            yield f"{theirs}.fc2", f"{ours}.feed_forward.outer"
            yield f"{theirs}.final_layer_norm", f"{ours}.feed_forward_residual.norm"


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Marian's name -> ours, of every tensor; a shared matrix has several."""
    parameters = [
        (f"{theirs}.{kind}", f"{ours}.{kind}") for theirs, ours in parameter_names(config) for kind in ("weight", "bias")
    ]
    names = {**_EMBEDDINGS, _BIAS: "output.bias", **dict(parameters)}
    if not config.share_embeddings:
        del names["model.shared.weight"]
    return names


def _read_config(document: Mapping[str, Any], generation: GenerationSettings, faults: list[str]) -> ModelConfig | None:
    """The architecture; None when it cannot be known. All that is unsupported goes to ``faults``."""
    found = setting_faults(document, _ONLY)
    config = None
    try:
        fields = _MarianConfig.model_validate({**document, **generation.start(has_default=True)})
        unsupported = fields.architecture_faults()
        found += unsupported
        config = None if unsupported else fields.architecture()
    except ValidationError as error:
        found += field_faults(error.errors())
    faults += [f"{CONFIG_NAME}: {fault}" for fault in found]
    return config


def _tokenizer_spec(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> MarianTokenizerSpec:
    tokens = {name: token_text(settings[name]) for name in _TOKENS if name in settings}
    faults += [f"{TOKENIZER_CONFIG_NAME}: {fault}" for fault in setting_faults(tokens, _TOKENS)]
    faults += [f"{TOKENIZER_CONFIG_NAME}: {fault}" for fault in setting_faults(settings, {"sp_model_kwargs": (None, {})})]
    separate = bool(settings.get("separate_vocabs"))
    return MarianTokenizerSpec(
        kind="marian",
        source_model=SOURCE_MODEL_NAME,
        target_model=TARGET_MODEL_NAME,
        source_vocabulary=VOCABULARY_NAME,
        target_vocabulary=TARGET_VOCABULARY_NAME if separate else VOCABULARY_NAME,
    )


def _open_tokenizer(
    spec: MarianTokenizerSpec, files: Mapping[str, Path | bytes], config: ModelConfig | None, faults: list[str]
) -> MarianTokenizer | None:
    """The tokenizer, None when there is none; what is wrong with it, or that it is not this model's, goes to ``faults``."""
    if missing := [f"{name}: is missing" for name, file in files.items() if isinstance(file, Path) and not file.is_file()]:
        faults += missing
        return None
    try:
        tokenizer = MarianTokenizer.load(spec, files)
    except (OSError, ValueError) as error:
        faults.append(str(error))
        return None
    if config is not None:
        faults += tokenizer.vocabulary_faults(config.source_vocab_size, config.target_vocab_size)
        faults += tokenizer.end_faults(config.eos_id)
    return tokenizer


def _tensors(config: ModelConfig, stored: Mapping[str, Tensor], file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """Tensors by our names; what is wrong with them goes to ``faults``."""
    tensors = dict(stored)
    # Old exports have the tables of positions, which are computed. One of another shape would be another model's.
    table = (config.max_positions, config.d_model)
    for name in _POSITIONS:
        positions = tensors.pop(name, None)
        if positions is not None and tuple(positions.shape) != table:
            faults.append(f"{file_name}: {name}: shape {list(positions.shape)}, expected {list(table)}")
    bias = tensors.get(_BIAS)
    if bias is None:
        # As in Marian's own module, which need not store one that is zero.
        tensors[_BIAS] = torch.zeros(config.target_vocab_size)
    elif bias.dim() == 2 and bias.shape[0] == 1:
        tensors[_BIAS] = bias[0]
    return rename(config, tensors, tensor_names(config), file_name, faults)


def _languages(settings: Mapping[str, Any]) -> list[LanguagePair]:
    source, target = settings.get("source_lang"), settings.get("target_lang")
    if not (isinstance(source, str) and isinstance(target, str) and source and target):
        return []
    return [LanguagePair(source=source, target=target)]


def _language_tokens(ids: Mapping[str, int]) -> LanguageTokens | None:
    """By ``>>deu<<`` a model is told to translate into ``deu``; one that knows a single language has no choice to make."""
    if len(ids) < 2:
        return None
    return LanguageTokens(tokens={token[2:-2]: i for token, i in ids.items()}, before_source="target", before_target=False)
