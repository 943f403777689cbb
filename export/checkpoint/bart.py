"""Hugging Face's BART directories, and those of its descendants with the same names: mBART, mBART-50 and Pegasus.

A directory with ``config.json`` (``"model_type": "bart"``, ``"mbart"`` or ``"pegasus"``), the weights and the tokenizer's files;
some have ``tokenizer_config.json``, ``generation_config.json`` and ``samples.txt``. Knows the names of their tensors and what
sets the three apart; does not know what a checkpoint becomes. M2M100 and NLLB (``m2m100.py``) build on it.

**The families.** BART normalizes after each sub-layer and once after the embedding; mBART before each, after the embedding and at
the end; Pegasus before each and at the end. BART's and mBART's learned positions begin with two rows that are never looked at.
Pegasus computes its positions, and may store them all the same.

**Forced tokens.** ``forced_bos_token_id`` is the token that every target starts with after the start token: BART's ``<s>``, or
the token of the one language that a multilingual model was tuned for. An older mBART that was tuned for one has that token in the
place of the start token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from export.checkpoint import marian
from export.checkpoint.bart_config import BartFields, MBartFields, PegasusFields
from export.checkpoint.bart_tokenizers import (
    MBART50_LANGUAGES,
    MBART_LANGUAGES,
    TokenizerParts,
    byte_level_tokenizer,
    fairseq_tokenizer,
    pegasus_tokenizer,
)
from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.generation import GenerationSettings, read_generation
from export.checkpoint.hugging_face import (
    CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    is_of_type,
    read_json,
    read_weights,
    rename,
    setting_faults,
    token_text,
)
from export.model import ModelConfig, NormPlacement, sinusoidal_table
from serving.errors import CheckpointError
from serving.manifest import DefaultOptions, LanguagePair, LanguageTokens, field_faults
from serving.tokenizers import open_tokenizer

# Fields that make another model of any of these families, and the values with which they do not.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "do_blenderbot_90_layernorm": (False, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (True, None),
    "pruned_heads": (None, {}),
    "quantization_config": (None, {}),
}
_TOKENS: Mapping[str, tuple[Any, ...]] = {"eos_token": ("</s>",), "unk_token": ("<unk>",), "pad_token": ("<pad>",)}
_MBART_CODE = re.compile(r"([a-z]{2,3}_[A-Z]{2})")
_MBART_CLASSES = ("MBartTokenizer", "MBartTokenizerFast")
_MBART50_CLASSES = ("MBart50Tokenizer", "MBart50TokenizerFast")
_SHARED = "model.shared.weight"
_BIAS = "final_logits_bias"
_OUTPUT = "lm_head.weight"
_SIDES = ("encoder", "decoder")
# Rows of BART's table of positions before the first position's.
_POSITION_OFFSET = 2

# Each side's table of positions [max_positions, d_model], made of the tensors of a file, which is named, and taken out of them.
# What is wrong goes to the faults; after one, of whatever kind, nothing need be computed.
PositionTables = Callable[[ModelConfig, dict[str, Tensor], str, list[str]], dict[str, Tensor]]
# The tokenizer in a directory whose ``config.json`` and ``tokenizer_config.json`` hold this; None after a fault.
TokenizerReader = Callable[[Path, Mapping[str, Any], Mapping[str, Any], list[str]], TokenizerParts | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What sets one family apart from the others that have the same names."""

    model_type: str
    # For the one whose directory was not recognized.
    description: str
    fields: type[BartFields]
    # Fields that make another model, and the values with which they do not; beside those of every family.
    only: Mapping[str, tuple[Any, ...]]
    norm: NormPlacement
    embedding_norm: bool
    output_bias: bool
    positions: PositionTables
    tokenizer: TokenizerReader


class FamilyReader:
    """Reads the directories of one family; see ``CheckpointReader``."""

    def __init__(self, family: Family) -> None:
        """For this family."""
        self._family = family

    @property
    def description(self) -> str:
        """See ``CheckpointReader``."""
        return self._family.description

    def recognizes(self, directory: Path) -> bool:
        """Whether ``config.json`` states the family; a broken one that mentions it is told what is wrong by ``read``."""
        return is_of_type(directory, self._family.model_type)

    def read(self, directory: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when the architecture is known.
        """
        family, faults = self._family, list[str]()
        document = read_json(directory / CONFIG_NAME, faults) or {}
        generation = read_generation(directory, document, faults)
        config = _read_config(family, document, generation, faults)
        forced = generation.forced_start(config, faults) if config else None
        settings = read_json(directory / TOKENIZER_CONFIG_NAME, faults) or {}
        tokens = {name: token_text(settings[name]) for name in _TOKENS if name in settings}
        faults += [f"{TOKENIZER_CONFIG_NAME}: {fault}" for fault in setting_faults(tokens, _TOKENS)]
        faults += [f"{TOKENIZER_CONFIG_NAME}: {fault}" for fault in setting_faults(settings, {"sp_model_kwargs": (None, {})})]
        parts = family.tokenizer(directory, document, settings, faults)
        languages: list[LanguagePair] = []
        language_tokens, defaults = None, DefaultOptions()
        if parts and config:
            _check_tokenizer(parts, config, faults)
            languages, language_tokens = _languages(parts, forced, config.decoder_start_id, faults)
            hidden = forced is not None or (language_tokens is not None and language_tokens.before_target)
            defaults = generation.defaults(config, hidden_tokens=int(hidden), faults=faults)
        stored, weights_sha256, weights_name = read_weights(directory, faults)
        tensors = _tensors(family, config, stored, weights_name, faults) if config and stored else {}
        sample_lines = read_samples(directory, faults)
        if faults or config is None or parts is None:
            raise CheckpointError(directory, faults)
        return Checkpoint(
            name=directory.resolve().name,
            # However a family makes its tables, they are tensors here.
            config=config.model_copy(update={"positions": "learned"}),
            tensors=tensors,
            languages=languages,
            language_tokens=language_tokens,
            target_prefix=() if forced is None else (forced,),
            defaults=defaults,
            num_beams=generation.num_beams,
            tokenizer=parts.spec,
            tokenizer_files=parts.files,
            source_prefix=parts.source_prefix,
            weights_sha256=weights_sha256,
            sample_lines=sample_lines,
            warnings=generation.warnings,
        )


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """The file's name -> ours, of every tensor but the tables of positions; a shared matrix has several."""
    names = marian.tensor_names(config)
    if not config.output_bias:
        del names[_BIAS]
    norms = {}
    for side in _SIDES:
        if config.embedding_norm:
            norms[f"model.{side}.layernorm_embedding"] = f"{side}.embedding.norm"
        if config.norm == "pre":
            norms[f"model.{side}.layer_norm"] = f"{side}.final_norm"
    return names | {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in norms.items() for kind in ("weight", "bias")}


def stored_positions(config: ModelConfig, tensors: dict[str, Tensor], file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """Learned tables, in whose first rows no position is."""
    tables = {}
    for side in _SIDES:
        name = f"model.{side}.embed_positions.weight"
        table, shape = tensors.pop(name, None), [config.max_positions + _POSITION_OFFSET, config.d_model]
        if table is None:
            faults.append(f"{file_name}: {name}: missing, expected {shape}")
        elif fault := _table_fault(table, shape):
            faults.append(f"{file_name}: {name}: {fault}")
        else:
            tables[side] = table[_POSITION_OFFSET:]
    return tables


def sinusoidal_positions(config: ModelConfig, tensors: dict[str, Tensor], file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """Sines, then cosines, unless there is a table in the file, which a model may have trained."""
    tables, shape = {}, [config.max_positions, config.d_model]
    for side in _SIDES:
        name = f"model.{side}.embed_positions.weight"
        table = tensors.pop(name, None)
        if table is not None and (fault := _table_fault(table, shape)):
            faults.append(f"{file_name}: {name}: {fault}")
        elif table is not None:
            tables[side] = table
        elif not faults:
            tables[side] = sinusoidal_table(config.max_positions, config.d_model, concatenated=True)
    return tables


def _table_fault(table: Tensor, shape: list[int]) -> str | None:
    if list(table.shape) != shape:
        return f"shape {list(table.shape)}, expected {shape}"
    if not table.is_floating_point():
        return f"of type {table.dtype}, expected floating point"
    bad = int((~torch.isfinite(table)).sum())
    return f"{bad} of {table.numel()} values are not finite" if bad else None


def _read_config(
    family: Family, document: dict[str, Any], generation: GenerationSettings, faults: list[str]
) -> ModelConfig | None:
    """The architecture, without its tables of positions; None when it cannot be known."""
    if not document:
        return None
    found = setting_faults(document, {**_ONLY, **family.only})
    has_default = not family.fields.model_fields["decoder_start_token_id"].is_required()
    try:
        fields = family.fields.model_validate(document | generation.start(has_default=has_default))
        found += (unsupported := fields.architecture_faults())
    except ValidationError as error:
        faults += [f"{CONFIG_NAME}: {fault}" for fault in found + field_faults(error.errors())]
        return None
    faults += [f"{CONFIG_NAME}: {fault}" for fault in found]
    if unsupported:
        return None
    return fields.architecture(family.norm, embedding_norm=family.embedding_norm, output_bias=family.output_bias)


def _check_tokenizer(parts: TokenizerParts, config: ModelConfig, faults: list[str]) -> None:
    """Whether there is such a tokenizer and it is this model's; what is wrong with it goes to ``faults``."""
    taken = {config.pad_id, config.eos_id}
    faults += [
        f"language {code}: its token {token_id} is outside a vocabulary of {config.target_vocab_size}, or another's"
        for code, token_id in parts.languages.items()
        if token_id >= config.target_vocab_size or token_id in taken
    ]
    if missing := [f"{name}: is missing" for name, at in parts.files.items() if isinstance(at, Path) and not at.is_file()]:
        faults += missing
        return
    try:
        tokenizer = open_tokenizer(parts.spec, parts.files)
    except (OSError, ValueError) as error:
        faults.append(str(error))
        return
    faults += tokenizer.vocabulary_faults(config.source_vocab_size, config.target_vocab_size)
    if parts.end_id != config.eos_id:
        faults.append(f"tokenizer: </s> has id {parts.end_id}, the model's end-of-sentence token is {config.eos_id}")


def _languages(
    parts: TokenizerParts, forced: int | None, start: int, faults: list[str]
) -> tuple[list[LanguagePair], LanguageTokens | None]:
    """The pairs that a model translates and how it is told which.

    One whose targets all start with the same language's token, forced or in the place of the start token, translates into that.
    """
    tokens = parts.languages
    if not tokens:
        return [], None
    targets = [code for code, token_id in tokens.items() if token_id == (start if forced is None else forced)]
    if forced is not None and not targets:
        faults.append(f"forced_bos_token_id: {forced} is no language's token")
    told = LanguageTokens(
        tokens=tokens,
        before_source=None if parts.language_is_last else "source",
        after_source="source" if parts.language_is_last else None,
        before_target=forced is None and not targets,
    )
    return [LanguagePair(source=code, target=target) for code in tokens for target in targets if code != target], told


def _tensors(
    family: Family, config: ModelConfig, stored: Mapping[str, Tensor], file_name: str, faults: list[str]
) -> dict[str, Tensor]:
    """Tensors by our names; what is wrong with them goes to ``faults``."""
    if not any(name.startswith("model.") for name in stored):
        # Of a model that was stored without the head that makes logits, as the first BARTs were.
        stored = {name if name in (_BIAS, _OUTPUT) else f"model.{name}": tensor for name, tensor in stored.items()}
    tables = {name: tensor for name, tensor in stored.items() if ".embed_positions." in name}
    tensors = {name: tensor for name, tensor in stored.items() if name not in tables}
    if family.output_bias:
        bias = tensors.get(_BIAS)
        if bias is None:
            # As in the family's own module, which need not store one that is zero.
            tensors[_BIAS] = torch.zeros(config.target_vocab_size)
        elif bias.dim() == 2 and bias.shape[0] == 1:
            tensors[_BIAS] = bias[0]
    if not config.share_embeddings and (shared := tensors.pop(_SHARED, None)) is not None:
        # Older versions shared it between the sides all the same, newer ones have no use for it.
        for side in _SIDES:
            tensors.setdefault(f"model.{side}.embed_tokens.weight", shared)
    renamed = rename(config, tensors, tensor_names(config), file_name, faults)
    positions = family.positions(config, tables, file_name, faults)
    faults += [f"{file_name}: {name}: extra {list(tensor.shape)}" for name, tensor in tables.items()]
    return renamed | {f"{side}.embedding.position_table": table.to(torch.float32) for side, table in positions.items()}


def _mbart_tokenizer(
    directory: Path, document: Mapping[str, Any], settings: Mapping[str, Any], faults: list[str]
) -> TokenizerParts | None:
    """mBART-50's or that of the older mBART, which puts a source's language behind its end."""
    stated = check_class(document, settings, (*_MBART_CLASSES, *_MBART50_CLASSES), _MBART_CLASSES[0], faults)
    is_older = stated in _MBART_CLASSES
    known = MBART_LANGUAGES.split() + ([] if is_older else MBART50_LANGUAGES.split())
    return fairseq_tokenizer(directory, settings, _MBART_CODE, faults, known=known, language_is_last=is_older)


def check_class(
    document: Mapping[str, Any], settings: Mapping[str, Any], supported: tuple[str, ...], default: str, faults: list[str]
) -> str:
    """The tokenizer's class as the configurations state it; another than those supported goes to ``faults``."""
    name, stated = TOKENIZER_CONFIG_NAME, settings.get("tokenizer_class")
    if stated is None:
        name, stated = CONFIG_NAME, document.get("tokenizer_class") or default
    faults += [f"{name}: {fault}" for fault in setting_faults({"tokenizer_class": stated}, {"tokenizer_class": supported})]
    return str(stated)


def _pegasus_tokenizer(
    directory: Path, document: Mapping[str, Any], settings: Mapping[str, Any], faults: list[str]
) -> TokenizerParts | None:
    check_class(document, settings, ("PegasusTokenizer", "PegasusTokenizerFast"), "PegasusTokenizer", faults)
    return pegasus_tokenizer(directory, settings, faults)


def _bart_tokenizer(
    directory: Path, document: Mapping[str, Any], settings: Mapping[str, Any], faults: list[str]
) -> TokenizerParts | None:
    names = ("BartTokenizer", "BartTokenizerFast", "RobertaTokenizer", "RobertaTokenizerFast")
    check_class(document, settings, names, "BartTokenizer", faults)
    return byte_level_tokenizer(directory, settings, faults)


BART = Family(
    model_type="bart",
    description=f'Hugging Face BART ({CONFIG_NAME} with "model_type": "bart", weights, tokenizer.json or vocab.json)',
    fields=BartFields,
    only={
        "add_final_layer_norm": (False, None),
        "normalize_before": (False, None),
        "normalize_embedding": (True, None),
        "static_position_embeddings": (False, None),
    },
    norm="post",
    embedding_norm=True,
    output_bias=True,
    positions=stored_positions,
    tokenizer=_bart_tokenizer,
)
MBART = Family(
    model_type="mbart",
    description=f'Hugging Face mBART or mBART-50 ({CONFIG_NAME} with "model_type": "mbart", weights, sentencepiece.bpe.model)',
    fields=MBartFields,
    only={
        "add_final_layer_norm": (True, None),
        "normalize_before": (True, None),
        "normalize_embedding": (True, None),
        "static_position_embeddings": (False, None),
    },
    norm="pre",
    embedding_norm=True,
    output_bias=True,
    positions=stored_positions,
    tokenizer=_mbart_tokenizer,
)
PEGASUS = Family(
    model_type="pegasus",
    description=f'Hugging Face Pegasus ({CONFIG_NAME} with "model_type": "pegasus", weights, spiece.model)',
    fields=PegasusFields,
    only={
        "add_final_layer_norm": (True, None),
        "normalize_before": (True, None),
        "normalize_embedding": (False, None),
        "static_position_embeddings": (True, None),
    },
    norm="pre",
    embedding_norm=False,
    output_bias=True,
    positions=sinusoidal_positions,
    tokenizer=_pegasus_tokenizer,
)
