"""Hugging Face's T5, mT5 and umT5 directories, which Flan-T5's and MADLAD-400's are too.

A directory with ``config.json`` (``"model_type": "t5"``, ``"mt5"`` or ``"umt5"``), the weights and ``spiece.model`` or else
``tokenizer.json``; some have ``tokenizer_config.json``, ``generation_config.json`` and ``samples.txt``. Knows their fields and
the names of their tensors; does not know tokenizers (``t5_tokenizers.py``), nor what a checkpoint becomes.

**Scales.** T5 does not divide scores by sqrt(d_k): its queries are multiplied by as much here. T5 1.0 multiplies the decoder's
last states by d_model^-0.5: here their norm is. umT5 does so where it states ``tie_word_embeddings``, mT5 never, whatever it
states. Whether there is an output projection of its own is told by the weights: newer versions of the library write that all are
tied.

**Positions.** Each layer of umT5 has biases of its own; a stack of the others shares them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from export.checkpoint.bart_config import TokenId
from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.generation import GenerationSettings, read_generation
from export.checkpoint.hugging_face import (
    ACTIVATIONS,
    CONFIG_NAME,
    TOKENIZER_NAME,
    first_of,
    is_of_type,
    read_json,
    read_weights,
    rename,
    setting_faults,
)
from export.checkpoint.t5_tokenizers import SENTENCEPIECE_NAME, T5Tokenizer, read_tokenizer
from export.model import Activation, Depth, Heads, Length, ModelConfig, Size
from serving.errors import CheckpointError
from serving.manifest import DefaultOptions, LanguageTokens, field_faults

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


class _T5Config(BaseModel):
    """The fields of ``config.json`` that make the architecture, with the defaults of ``T5Config``."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model_type: Literal["t5", "mt5", "umt5"]
    vocab_size: Size = 32128
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Depth = 6
    num_decoder_layers: Depth | None = None
    num_heads: Heads = 8
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=2**16, multiple_of=4)] = 32
    relative_attention_max_distance: Length = 128
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    feed_forward_proj: str = "relu"
    n_positions: Length = _MAX_POSITIONS
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    pad_token_id: TokenId = 0
    eos_token_id: Annotated[TokenId, BeforeValidator(first_of)] = 1
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
        return self.model_type != "mt5" and (self.tie_word_embeddings if stated is None else stated)

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
            relative_per_layer=self.model_type == "umt5",
            max_positions=self.n_positions,
            bias=False,
            scale_embedding=False,
            layer_norm_eps=self.layer_norm_epsilon,
            pad_id=self.pad_token_id,
            eos_id=self.eos_token_id,
            decoder_start_id=self.decoder_start_token_id,
        )


class _MT5Config(_T5Config):
    """With the defaults of ``MT5Config`` and ``UMT5Config``, which are the same."""

    vocab_size: Size = 250112
    d_ff: Size = 1024
    num_layers: Depth = 8
    num_heads: Heads = 6
    feed_forward_proj: str = "gated-gelu"


_CONFIGS: Mapping[str, type[_T5Config]] = {"t5": _T5Config, "mt5": _MT5Config, "umt5": _MT5Config}


class T5Reader:
    """Reads this format; see ``CheckpointReader``."""

    description = (
        f'Hugging Face T5, mT5 or umT5 ({CONFIG_NAME} with "model_type": "t5", "mt5" or "umt5", weights, {SENTENCEPIECE_NAME} or '
        f"{TOKENIZER_NAME})"
    )

    def recognizes(self, directory: Path) -> bool:
        """Whether ``config.json`` states one of the types; a broken one that mentions it is told what is wrong by ``read``."""
        return any(is_of_type(directory, model_type) for model_type in _CONFIGS)

    def read(self, directory: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when the architecture is known.
        """
        faults: list[str] = []
        document = read_json(directory / CONFIG_NAME, faults) or {}
        generation = read_generation(directory, document, faults)
        fields = _read_fields(document, generation, faults)
        tokenizer = read_tokenizer(directory, faults)
        stored, weights_sha256, weights_name = read_weights(directory, faults)
        config = None if fields is None else _with_output(fields.architecture(), stored)
        forced = generation.forced_start(config, faults) if config else None
        target_prefix = () if forced is None else (forced,)
        defaults = generation.defaults(config, hidden_tokens=len(target_prefix), faults=faults) if config else DefaultOptions()
        tensors = _tensors(config, stored, weights_name, faults) if config and stored else {}
        sample_lines = read_samples(directory, faults)
        if tokenizer and config:
            faults += _prefix_faults(tokenizer, target_prefix)
            config = _cut(config, tensors, tokenizer, faults)
        if faults or fields is None or config is None or tokenizer is None:
            raise CheckpointError(directory, faults)
        _scale(fields, tensors)
        languages = tokenizer.languages
        return Checkpoint(
            name=directory.resolve().name,
            config=config,
            tensors=tensors,
            languages=[],
            language_tokens=LanguageTokens(tokens=languages, before_source="target", before_target=False) if languages else None,
            source_prefix=tokenizer.source_prefix,
            source_ends_with_eos=tokenizer.source_ends_with_eos,
            target_prefix=target_prefix,
            defaults=_of_tokens(defaults, tokenizer.size),
            num_beams=generation.num_beams,
            tokenizer=tokenizer.spec,
            tokenizer_files=tokenizer.files,
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
        if not config.relative_per_layer:
            yield f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{side}.relative_positions.buckets"
        for i in range(depth):
            theirs, ours = f"{side}.block.{i}.layer", f"{side}.layers.{i}"
            if config.relative_per_layer:
                yield f"{theirs}.0.SelfAttention.relative_attention_bias", f"{ours}.relative_positions.buckets"
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
    # null is as good as nothing where a field has a default.
    given = {name: value for name, value in {**document, **generation.start(has_default=True)}.items() if value is not None}
    fields = None
    try:
        fields = _CONFIGS.get(str(document.get("model_type")), _T5Config).model_validate(given)
        found += (unsupported := fields.architecture_faults())
        fields = None if unsupported else fields
    except ValidationError as error:
        found += field_faults(error.errors())
    faults += [f"{CONFIG_NAME}: {fault}" for fault in found]
    return fields


def _with_output(config: ModelConfig, stored: Mapping[str, Tensor]) -> ModelConfig:
    """With an output projection of its own where the weights have one."""
    output, embedding = stored.get(_OUTPUT), next((stored[name] for name in _EMBEDDINGS if name in stored), None)
    is_tied = output is None or embedding is None or (output.shape == embedding.shape and bool((output == embedding).all()))
    return config.model_copy(update={"tie_output": is_tied})


def _tensors(config: ModelConfig, stored: Mapping[str, Tensor], file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """Tensors by our names; what is wrong with them goes to ``faults``."""
    tensors = {name: tensor for name, tensor in stored.items() if name != _UNUSED}
    return rename(config, tensors, tensor_names(config), file_name, faults)


def _prefix_faults(tokenizer: T5Tokenizer, target_prefix: tuple[int, ...]) -> Iterator[str]:
    """Tokens that texts are made to start with, and that are left out."""
    for called, prefix in (
        (f"{tokenizer.file_name}: before a text", tokenizer.source_prefix),
        ("forced_bos_token_id", target_prefix),
    ):
        for token_id in prefix:
            if token_id >= tokenizer.size:
                yield f"{called}: {token_id} is none of {tokenizer.size} pieces"


def _cut(config: ModelConfig, tensors: dict[str, Tensor], tokenizer: T5Tokenizer, faults: list[str]) -> ModelConfig:
    """The architecture with as many tokens as the tokenizer needs, and ``tensors`` likewise."""
    size, name = tokenizer.size, tokenizer.file_name
    if tokenizer.end_id != config.eos_id:
        faults.append(f"{name}: </s> has id {tokenizer.end_id}, the model's end-of-sentence token is {config.eos_id}")
    if size > config.target_vocab_size:
        faults.append(f"{name}: has {size} pieces, the vocabulary is of {config.target_vocab_size}")
        return config
    for field in ("pad_id", "eos_id", "decoder_start_id"):
        if getattr(config, field) >= size:
            faults.append(f"{field.replace('_id', '_token_id')}: {getattr(config, field)} is none of {size} pieces")
    for tensor in _TOKENS:
        if tensor in tensors:
            tensors[tensor] = tensors[tensor][:size].clone()
    return config.model_copy(update={"source_vocab_size": size, "target_vocab_size": size})


def _of_tokens(defaults: DefaultOptions, size: int) -> DefaultOptions:
    """The same without what forbids tokens that are left out, or would end a target at one."""
    kept = {
        "suppressed": [sequence for sequence in defaults.suppressed if max(sequence) < size],
        "suppressed_first": [token_id for token_id in defaults.suppressed_first if token_id < size],
        "end_ids": [token_id for token_id in defaults.end_ids if token_id < size],
    }
    return defaults.model_copy(update=kept)


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
