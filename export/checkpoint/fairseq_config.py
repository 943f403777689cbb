"""fairseq's settings: where a checkpoint has them, what they say of the architecture, and which make another one.

Knows every setting of the ``transformer`` and of the ``translation`` task by name, and fairseq's defaults; does not know tensors
or dictionaries (``fairseq.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from export.checkpoint.archives import settings_of
from export.checkpoint.base import alignment
from export.checkpoint.hugging_face import setting_faults
from export.checkpoint.stand_ins import OMEGACONF_CLASSES
from export.model import Activation, Depth, Heads, Length, ModelConfig, Size
from serving.manifest import MosesSpec, field_faults

PAD_ID, EOS_ID = 1, 2
# Classes of which a checkpoint may hold objects. fairseq's own dataclasses of settings are not among them: they hold enumerations
# that cannot be pickled, so that it stores them as plain values.
CLASSES = (
    *OMEGACONF_CLASSES,
    *(f"fairseq.{module}.{name}Meter" for module in ("meters", "logging.meters") for name in ("Average", "Stopwatch", "Time")),
    "fairseq.logging.meters.SumMeter",
    "fairseq.data.dictionary.Dictionary",
)
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}
_OFF = (None, False, 0)
# Settings that would make another architecture, and the values with which they do not.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "adaptive_input": _OFF,
    "adaptive_softmax_cutoff": (None, ""),
    "base_layers": _OFF,
    "char_inputs": _OFF,
    "cross_self_attention": _OFF,
    "decoder_add_adapters": _OFF,
    "decoder_latent_layer": _OFF,
    "decoder_layers_to_keep": (None, ""),
    "decoder_recurrent_stacking": (None,),
    "decoder_xformers_att_config": (None,),
    "encoder_add_adapters": _OFF,
    "encoder_latent_layer": _OFF,
    "encoder_layers_to_keep": (None, ""),
    "encoder_recurrent_stacking": (None,),
    "encoder_xformers_att_config": (None,),
    "merge_src_tgt_embed": _OFF,
    "moe_freq": _OFF,
    "no_cross_attention": _OFF,
    "no_token_positional_embeddings": _OFF,
    "scale_attn": _OFF,
    "scale_fc": _OFF,
    "scale_heads": _OFF,
    "scale_resids": _OFF,
    "task": (None, "translation"),
    "use_factorized_embedding": _OFF,
}


def _set(default: Any) -> BeforeValidator:
    """A setting that is there without a value has its default."""
    return BeforeValidator(lambda value: default if value is None else value)


class FairseqConfig(BaseModel):
    """The settings that make the architecture, with fairseq's defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    arch: str = "transformer"
    source_lang: Annotated[str, Field(min_length=1)] | None = None
    target_lang: Annotated[str, Field(min_length=1)] | None = None
    encoder_embed_dim: Annotated[Size, _set(512)] = 512
    encoder_ffn_embed_dim: Annotated[Size, _set(2048)] = 2048
    encoder_layers: Annotated[Depth, _set(6)] = 6
    encoder_attention_heads: Annotated[Heads, _set(8)] = 8
    encoder_normalize_before: Annotated[bool, _set(False)] = False
    encoder_learned_pos: Annotated[bool, _set(False)] = False
    decoder_embed_dim: Size | None = None
    decoder_ffn_embed_dim: Size | None = None
    decoder_layers: Annotated[Depth, _set(6)] = 6
    decoder_attention_heads: Annotated[Heads, _set(8)] = 8
    decoder_normalize_before: Annotated[bool, _set(False)] = False
    decoder_learned_pos: Annotated[bool, _set(False)] = False
    decoder_input_dim: Size | None = None
    decoder_output_dim: Size | None = None
    no_decoder_final_norm: Annotated[bool, _set(False)] = False
    activation_fn: Annotated[str, _set("relu")] = "relu"
    share_all_embeddings: Annotated[bool, _set(False)] = False
    share_decoder_input_output_embed: Annotated[bool, _set(False)] = False
    no_scale_embedding: Annotated[bool, _set(False)] = False
    layernorm_embedding: Annotated[bool, _set(False)] = False
    max_source_positions: Annotated[Length, _set(1024)] = 1024
    max_target_positions: Annotated[Length, _set(1024)] = 1024
    # Of models that were trained with alignments; for others CTranslate2 takes the mean of the last layer's heads.
    alignment_layer: Annotated[int, _set(-1)] = -1
    alignment_heads: Annotated[int, _set(0)] = 0

    def architecture_faults(self) -> list[str]:
        """Every setting that contradicts another, or that this project's module has no place for."""
        faults = []
        if not self.arch.startswith("transformer") or self.arch.startswith("transformer_lm"):
            faults.append(f"arch: {self.arch!r} is not supported, only those of the encoder-decoder 'transformer'")
        if self.activation_fn not in _ACTIVATIONS:
            supported = " or ".join(map(repr, _ACTIVATIONS))
            faults.append(f"activation_fn: {self.activation_fn!r} is not supported, only {supported}")
        d = self.encoder_embed_dim
        for name in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"):
            if getattr(self, name) not in (None, d):
                faults.append(f"{name}: {getattr(self, name)} is not supported beside encoder_embed_dim {d}, only the same")
        for name in ("attention_heads", "normalize_before"):
            encoder, decoder = getattr(self, f"encoder_{name}"), getattr(self, f"decoder_{name}")
            if encoder != decoder:
                faults.append(f"encoder_{name}, decoder_{name}: {encoder} and {decoder}; different ones are not supported")
        if d % self.encoder_attention_heads or d % 2 or d < 4:
            faults.append(
                f"encoder_embed_dim: {d} is no multiple of 2 and of encoder_attention_heads {self.encoder_attention_heads}"
            )
        if self.decoder_normalize_before and self.no_decoder_final_norm:
            faults.append("no_decoder_final_norm: True is not supported beside decoder_normalize_before")
        self._alignment(faults)
        return faults

    def _alignment(self, faults: list[str]) -> tuple[int, int | None]:
        num_layers, num_heads = self.decoder_layers, self.decoder_attention_heads
        return alignment(self.alignment_layer, self.alignment_heads, num_layers=num_layers, num_heads=num_heads, faults=faults)

    def architecture(self, source_vocab_size: int, target_vocab_size: int) -> ModelConfig:
        """The same for ``Transformer``; only where there are no faults."""
        alignment_layer, alignment_heads = self._alignment([])
        return ModelConfig(
            source_vocab_size=source_vocab_size,
            target_vocab_size=target_vocab_size,
            d_model=self.encoder_embed_dim,
            num_heads=self.encoder_attention_heads,
            num_encoder_layers=self.encoder_layers,
            num_decoder_layers=self.decoder_layers,
            encoder_d_ff=self.encoder_ffn_embed_dim,
            decoder_d_ff=self.decoder_ffn_embed_dim or self.encoder_ffn_embed_dim,
            norm="pre" if self.encoder_normalize_before else "post",
            activation=_ACTIVATIONS[self.activation_fn],
            positions="learned",
            max_positions=min(self.max_source_positions, self.max_target_positions),
            scale_embedding=not self.no_scale_embedding,
            share_embeddings=self.share_all_embeddings,
            tie_output=self.share_all_embeddings or self.share_decoder_input_output_embed,
            embedding_norm=self.layernorm_embedding,
            layer_norm_eps=1e-5,
            alignment_layer=alignment_layer,
            alignment_heads=alignment_heads,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            decoder_start_id=EOS_ID,
        )


def read_arguments(document: Mapping[str, Any], file_name: str, faults: list[str]) -> dict[str, Any] | None:
    """The settings of task and model by their names on the command line; None after a fault."""
    # Whichever there is not is None.
    stated = [name for name in ("args", "cfg") if document.get(name) is not None]
    settings = settings_of(document[stated[0]], f"{file_name}: {stated[0]}", faults) if stated else {}
    if settings is None or (settings and stated[0] == "args"):
        return settings
    model, task = settings.get("model"), settings.get("task")
    if not isinstance(model, dict):
        faults.append(f"{file_name}: has no settings under args, nor under cfg: model")
        return None
    task = task if isinstance(task, dict) else {}
    # The model's count where both state one.
    arguments = {**task, **model, "tokenizer": settings.get("tokenizer")}
    for side in ("encoder", "decoder"):
        # Newer ones are parted by side.
        if isinstance(own := arguments.get(side), dict):
            arguments |= {f"{side}_{name}": value for name, value in own.items()}
    arguments["task"] = task.get("_name", arguments.get("task"))
    arguments["arch"] = model.get("arch", model.get("_name", "transformer"))
    return arguments


def read_settings(arguments: Mapping[str, Any], file_name: str, faults: list[str]) -> FairseqConfig | None:
    """What the arguments say of the architecture; None after a fault."""
    found = setting_faults(arguments, _ONLY)
    settings = None
    try:
        settings = FairseqConfig.model_validate(dict(arguments))
        found += settings.architecture_faults()
    except ValidationError as error:
        found += field_faults(error.errors())
    faults += [f"{file_name}: {fault}" for fault in found]
    return None if found else settings


def moses_of(arguments: Mapping[str, Any], settings: FairseqConfig) -> MosesSpec | None:
    """How words are cut, where the settings name Moses' tokenizer; as a rule only those of ``fairseq-interactive`` do."""
    tokenizer = arguments.get("tokenizer")
    options = tokenizer if isinstance(tokenizer, dict) else arguments
    name = tokenizer.get("_name") if isinstance(tokenizer, dict) else tokenizer
    if name != "moses" or settings.source_lang is None or settings.target_lang is None:
        return None
    return MosesSpec(
        source_language=settings.source_lang,
        target_language=settings.target_lang,
        normalize_punctuation=False,
        aggressive_dash_splits=not _option(options, "no_dash_splits"),
        escape=not _option(options, "no_escape"),
    )


def _option(options: Mapping[str, Any], name: str) -> bool:
    return bool(options.get(name) or options.get(f"moses_{name}"))
