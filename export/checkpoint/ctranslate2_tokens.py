"""The tokens of a CTranslate2 model: ``config.json``, vocabularies, and which id each token gets.

Knows both files, the settings that older models have in ``model.bin`` instead, and what a source and a target start and end with;
does not know weights (``ctranslate2_weights.py``) or tokenizers (``vocabulary.py``).

**Ids** are those of the vocabularies, with two exceptions. A decoder that starts from a zero embedding (Marian's) gets one more
token, whose embedding is zero. And the end-of-sentence token has one id on both sides here: where vocabularies are apart and
differ in it, it trades places with another. CTranslate2 itself has no padding: ``<pad>`` or ``<blank>`` is taken where there is
one, otherwise the start token.

**Sources.** Whether they end in the end-of-sentence token only some converters state (``add_source_eos``); by the others it is
among the tokens that a user passes. Those of Marian's models do, and where a target starts with that token or with padding
(M2M100, NLLB, BART, Pegasus); those of models that start with the beginning-of-sentence token (OpenNMT's) do not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from torch import Tensor

from export.checkpoint.ctranslate2_binary import ModelBinary
from export.checkpoint.ctranslate2_weights import Settings
from export.checkpoint.hugging_face import CONFIG_NAME, read_json
from export.checkpoint.vocabulary import END_TOKEN, UNKNOWN_TOKEN, Vocabularies
from serving.manifest import LanguageTokens, field_faults

# Binary versions before this one have the settings of config.json in the file itself.
_CONFIG_VERSION = 6
# Others are those of AWQ.
_OWN_QUANTIZATION = 0
_START_TOKEN = "<s>"
_PADDING = ("<pad>", "<blank>")
# Tokens that are no text in any vocabulary.
_MARKERS = (UNKNOWN_TOKEN, END_TOKEN, _START_TOKEN, *_PADDING, "<mask>")
# Tokens of languages, the code in parentheses: M2M100's, NLLB's, mBART's. A source starts with its own, a target with its own.
_LANGUAGES = tuple(map(re.compile, (r"__([a-z]{2,3})__", r"([a-z]{3}_[A-Z][a-z]{3})", r"([a-z]{2}_[A-Z]{2})")))

_Text = Annotated[str, Field(min_length=1)]


class TokenConfig(BaseModel):
    """The fields of ``config.json`` that say how to translate, with CTranslate2's defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    unk_token: _Text = UNKNOWN_TOKEN
    bos_token: _Text | None = _START_TOKEN
    eos_token: _Text = END_TOKEN
    # None: a user passes it with every request.
    decoder_start_token: _Text | None = _START_TOKEN
    add_source_bos: bool = False
    add_source_eos: bool = False
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)] | None = None


@dataclass(frozen=True, slots=True)
class Numbering:
    """Tokens by their ids here, and the row that each has in the file; None for the one that is not there."""

    source: list[str | None]
    target: list[str | None]
    source_rows: list[int | None]
    target_rows: list[int | None]

    @property
    def shared(self) -> bool:
        """Whether both sides have the same tokens in the same order."""
        return self.source == self.target and self.source_rows == self.target_rows

    def align(self, source_id: int, target_id: int) -> int:
        """Give two tokens, one of each side, the same id; others trade places with them. Returns the id."""
        if target_id < len(self.source):
            _swap(self.source, source_id, target_id)
            _swap(self.source_rows, source_id, target_id)
            return target_id
        _swap(self.target, source_id, target_id)
        _swap(self.target_rows, source_id, target_id)
        return source_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a model's tokens are, and what a source and a target start and end with."""

    numbering: Numbering
    pad_id: int
    eos_id: int
    decoder_start_id: int
    # Ids that every source starts with, before the language's.
    source_prefix: tuple[int, ...]
    source_ends_with_eos: bool
    language_tokens: LanguageTokens | None
    vocabularies: Vocabularies


def read_config(directory: Path, model: ModelBinary, faults: list[str]) -> TokenConfig | None:
    """The settings; None when they cannot be known. Faults go to ``faults``."""
    if model.version < _CONFIG_VERSION:
        return _old_config(model, faults)
    found: list[str] = []
    document = read_json(directory / CONFIG_NAME, found)
    if document is None:
        faults += found or [f"{CONFIG_NAME}: is missing"]
        return None
    if (kind := document.get("quantization_type", _OWN_QUANTIZATION)) != _OWN_QUANTIZATION:
        faults.append(
            f"{CONFIG_NAME}: quantization_type: {kind!r}, weights of 4 bits (AWQ), is not supported; convert the model as it was "
            "before with --quantization int8 or float16"
        )
    try:
        return TokenConfig.model_validate(document)
    except ValidationError as error:
        faults += [f"{CONFIG_NAME}: {fault}" for fault in field_faults(error.errors())]
        return None


def read_vocabularies(directory: Path, faults: list[str]) -> tuple[list[str], list[str]] | None:
    """The tokens of source and target by id; None when there are none. Faults go to ``faults``."""
    found: list[str] = []
    shared = _read_vocabulary(directory, "shared_vocabulary", found)
    source = shared if shared is not None else _read_vocabulary(directory, "source_vocabulary", found)
    target = shared if shared is not None else _read_vocabulary(directory, "target_vocabulary", found)
    if not found and (source is None or target is None):
        if any((directory / f"source_1_vocabulary.{suffix}").is_file() for suffix in ("json", "txt")):
            found.append("source_1_vocabulary: several features of a source token are not supported")
        found.append("neither shared_vocabulary nor source_vocabulary and target_vocabulary are there, as .json or .txt")
    faults += found
    return None if found or source is None or target is None else (source, target)


def number_tokens(
    config: TokenConfig, settings: Settings, source: Sequence[str], target: Sequence[str], faults: list[str]
) -> Tokens | None:
    """Give every token its id; None after a fault, which goes to ``faults``."""
    found: list[str] = []
    numbering = Numbering(
        _tokens_of("source", source, settings.source_rows, config, found),
        _tokens_of("target", target, settings.target_rows, config, found),
        [*range(settings.source_rows)],
        [*range(settings.target_rows)],
    )
    start = config.decoder_start_token
    if config.eos_token == config.unk_token:
        found.append(f"{CONFIG_NAME}: eos_token, unk_token: both are {config.eos_token!r}; one token for both is not supported")
    if config.eos_token not in numbering.target:
        found.append(f"{CONFIG_NAME}: eos_token: {config.eos_token!r} is not in the target vocabulary")
    if not settings.start_from_zero and start is None:
        found.append(
            f"{CONFIG_NAME}: decoder_start_token: null is not supported; what targets start with would come with each request"
        )
    elif not settings.start_from_zero and start not in numbering.target:
        found.append(f"{CONFIG_NAME}: decoder_start_token: {start!r} is not in the target vocabulary")
    ends = _ends_with_eos(config, settings)
    if ends and config.eos_token not in numbering.source:
        found.append(f"{CONFIG_NAME}: eos_token: {config.eos_token!r} is not in the source vocabulary")
    begins = _starts_with_bos(config, settings, numbering)
    if begins and config.bos_token not in numbering.source:
        found.append(f"{CONFIG_NAME}: bos_token: {config.bos_token!r} is not in the source vocabulary")
    if found:
        faults += found
        return None

    added_id = None
    if settings.start_from_zero:
        for tokens, rows in ((numbering.source, numbering.source_rows), (numbering.target, numbering.target_rows)):
            tokens.append(None)
            rows.append(None)
        added_id = numbering.align(len(numbering.source) - 1, len(numbering.target) - 1)
    eos_id = numbering.target.index(config.eos_token)
    if ends or eos_id >= len(numbering.source):
        # Of no consequence where sources do not end in it; but the id has to be there.
        eos_id = numbering.align(numbering.source.index(config.eos_token) if ends else 0, eos_id)
    if added_id is not None:
        start_id = pad_id = added_id
    else:
        start_id = numbering.target.index(start)
        paddings = [numbering.target.index(token) for token in _PADDING if token in numbering.target]
        # Padding is masked: it only has to be an id of both sides.
        pad_id = next(i for i in (*paddings, start_id, eos_id) if i < len(numbering.source))
    languages = _languages(config, settings, numbering)
    return Tokens(
        numbering=numbering,
        pad_id=pad_id,
        eos_id=eos_id,
        decoder_start_id=start_id,
        source_prefix=(numbering.source.index(config.bos_token),) if begins else (),
        source_ends_with_eos=ends,
        language_tokens=languages,
        vocabularies=_vocabularies(config, numbering, languages),
    )


def ordered(embedding: Tensor, rows: Sequence[int | None]) -> Tensor:
    """The rows of a matrix or vector in another order; one that is not there is zero."""
    if list(rows) == list(range(len(embedding))):
        return embedding
    more = torch.cat((embedding, torch.zeros_like(embedding[:1])))
    return more[torch.tensor([len(embedding) if row is None else row for row in rows])]


def _old_config(model: ModelBinary, faults: list[str]) -> TokenConfig | None:
    """The settings of a model that has no ``config.json``, with what CTranslate2 takes where one is missing."""
    try:
        texts = {name: model.text(name) for name in ("unk_token", "bos_token", "eos_token")}
    except ValueError as error:
        faults.append(f"model.bin: {error}")
        return None
    settings: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
    config = TokenConfig.model_validate(settings)
    start: str | None = config.bos_token if model.scalar("with_target_bos") in (None, 1) else config.eos_token
    return config.model_copy(
        update={
            "add_source_bos": bool(model.scalar("with_source_bos")),
            "add_source_eos": bool(model.scalar("with_source_eos")),
            "decoder_start_token": None if model.scalar("user_decoder_start_tokens") else start,
        }
    )


def _read_vocabulary(directory: Path, name: str, found: list[str]) -> list[str] | None:
    """The tokens of one file; None when there is none, or after a fault."""
    for suffix in ("json", "txt"):
        path = directory / f"{name}.{suffix}"
        if not path.is_file():
            continue
        try:
            contents = path.read_bytes()
            tokens: Any = from_json(contents) if suffix == "json" else _lines(contents.decode())
        except OSError as error:
            found.append(f"{path.name}: cannot be read: {error.strerror}")
            return None
        except ValueError as error:
            found.append(f"{path.name}: is no {'JSON' if suffix == 'json' else 'text'}: {error}")
            return None
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            found.append(f"{path.name}: is no list of tokens")
            return None
        if twice := [token for token, count in Counter(tokens).items() if count > 1]:
            found.append(f"{path.name}: {', '.join(map(repr, twice[:3]))}: more than one id for a token is not supported")
            return None
        return tokens
    return None


def _lines(text: str) -> list[str]:
    """Tokens, one a line; a carriage return is part of them unless all have one."""
    lines = text.removesuffix("\n").split("\n")
    return [line[:-1] for line in lines] if all(line.endswith("\r") for line in lines) else lines


def _tokens_of(side: str, tokens: Sequence[str], rows: int, config: TokenConfig, found: list[str]) -> list[str | None]:
    """A side's tokens; the unknown token is the last where the file does not have it."""
    known: list[str | None] = [*tokens]
    if config.unk_token not in tokens and rows == len(tokens) + 1:
        known.append(config.unk_token)
    if len(known) != rows:
        found.append(f"the {side} vocabulary has {len(tokens)} tokens, the {side} embedding {rows} rows")
    elif config.unk_token not in known:
        found.append(f"{CONFIG_NAME}: unk_token: {config.unk_token!r} is not in the {side} vocabulary")
    return known


def _ends_with_eos(config: TokenConfig, settings: Settings) -> bool:
    """Whether sources end in the end-of-sentence token; see above."""
    start = config.decoder_start_token
    return config.add_source_eos or settings.start_from_zero or start == config.eos_token or start in _PADDING


def _starts_with_bos(config: TokenConfig, settings: Settings, numbering: Numbering) -> bool:
    """Whether sources start with the beginning-of-sentence token: where it is stated, and those of BART."""
    is_bart = (
        settings.embedding_norm
        and settings.norm == "post"
        and config.decoder_start_token == config.eos_token
        and not config.add_source_eos
        and config.bos_token in numbering.source
    )
    return config.add_source_bos or is_bart


def _languages(config: TokenConfig, settings: Settings, numbering: Numbering) -> LanguageTokens | None:
    """How a model is told its languages; None for one of a single pair."""
    if config.decoder_start_token != config.eos_token or settings.start_from_zero:
        return _vocabularies(config, numbering, None).language_tokens()
    for pattern in _LANGUAGES if numbering.shared else ():
        ids = {match[1]: i for i, token in enumerate(numbering.target) if token and (match := pattern.fullmatch(token))}
        if len(ids) > 1:
            return LanguageTokens(tokens=ids, before_source="source", before_target=True)
    return None


def _vocabularies(config: TokenConfig, numbering: Numbering, languages: LanguageTokens | None) -> Vocabularies:
    """Token -> id of both sides, the unknown and the end-of-sentence token under their usual names."""
    usual = {config.unk_token: UNKNOWN_TOKEN, config.eos_token: END_TOKEN}

    def ids(tokens: Sequence[str | None]) -> dict[str, int]:
        # One that has the usual name of another has no text here.
        named = {token: i for i, token in enumerate(tokens) if token is not None and token not in usual.values()}
        return {usual.get(token, token): i for token, i in named.items()} | {
            usual[token]: i for i, token in enumerate(tokens) if token in usual
        }

    tokens = [config.bos_token, config.decoder_start_token, *_MARKERS]
    if languages is not None:
        tokens += [numbering.target[i] for i in languages.tokens.values()]
    special = dict.fromkeys(usual.get(token, token) for token in tokens if token is not None)
    return Vocabularies(source=ids(numbering.source), target=ids(numbering.target), special_tokens=tuple(special))


def _swap(values: list[Any], one: int, other: int) -> None:
    values[one], values[other] = values[other], values[one]
