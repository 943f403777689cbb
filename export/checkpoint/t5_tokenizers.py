"""Tokenizers of T5 and its descendants: which file holds one, and which of its tokens are a translation's.

A directory has ``spiece.model`` or, where there is none, ``tokenizer.json``. Does not know any architecture.

**Vocabulary.** What a model has beyond the pieces, or at their end, are sentinels (``<extra_id_0>``), which stand for gaps in the
texts of its training, and padding to a round number. No translation has them, and they are left out.

**Languages.** MADLAD-400 has pieces like ``<2de>``, by which a source tells the language to translate into. SentencePiece makes
them of such text wherever it is; in the model that is written here they are control symbols, which no text makes. Where
a tokenizer puts a piece for a space before one, sources have it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from export.checkpoint.hugging_face import (
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    added_tokens,
    read_json,
    setting_faults,
    tokenizer_ids,
)
from serving.manifest import HuggingFaceTokenizerSpec, TokenizerSpec
from serving.tokenizers import open_tokenizer

SENTENCEPIECE_NAME = "spiece.model"

_CLASSES = tuple(f"{family}Tokenizer{fast}" for family in ("T5", "MT5") for fast in ("", "Fast"))
# Of a ``tokenizer.json`` that says all there is to say.
_WHOLE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SENTINEL = re.compile("\u2581?<extra_id_[0-9]+>")
_LANGUAGE = re.compile(r"<2(\w[\w-]*)>")
_END = "</s>"
_CONTROL = 3  # of SentencePiece's types of pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Tokenizer:
    """What a reader found of a tokenizer."""

    spec: TokenizerSpec | HuggingFaceTokenizerSpec
    # By the names that ``spec`` uses; there is one.
    files: dict[str, Path | bytes]
    # How many tokens a model needs: without sentinels at the end.
    size: int
    # Language code -> its token.
    languages: dict[str, int]
    # Ids that every source starts with, before its language.
    source_prefix: tuple[int, ...]
    source_ends_with_eos: bool = True
    # That of ``</s>``; None: it is not there.
    end_id: int | None

    @property
    def file_name(self) -> str:
        """For faults."""
        return next(iter(self.files))


def read_tokenizer(directory: Path, faults: list[str]) -> T5Tokenizer | None:
    """The tokenizer of a directory; None after a fault, which goes to ``faults``."""
    settings = read_json(directory / TOKENIZER_CONFIG_NAME, faults) or {}
    is_whole = not (directory / SENTENCEPIECE_NAME).exists() and (directory / TOKENIZER_NAME).exists()
    supported: dict[str, tuple[Any, ...]] = {
        "tokenizer_class": (*_CLASSES, *(_WHOLE_CLASSES if is_whole else ()), None),
        "sp_model_kwargs": (None, {}),
    }
    faults += [f"{TOKENIZER_CONFIG_NAME}: {fault}" for fault in setting_faults(settings, supported)]
    return (_whole_tokenizer if is_whole else _sentencepiece_tokenizer)(directory, settings, faults)


def _sentencepiece_tokenizer(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> T5Tokenizer | None:
    """What becomes of ``spiece.model``."""
    try:
        serialized = (directory / SENTENCEPIECE_NAME).read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        model = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]  # made at import
    except FileNotFoundError:
        faults.append(f"{SENTENCEPIECE_NAME}: is missing, and so is {TOKENIZER_NAME}")
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
    spec = TokenizerSpec(kind="sentencepiece", source_model=SENTENCEPIECE_NAME, target_model=SENTENCEPIECE_NAME)
    tokenizer = T5Tokenizer(
        spec=spec,
        files={SENTENCEPIECE_NAME: model.SerializeToString()},
        size=size,
        languages=languages,
        source_prefix=_before_language(processor, languages),
        end_id=processor.eos_id(),
    )
    try:
        open_tokenizer(spec, tokenizer.files)
    except ValueError as error:
        faults.append(str(error))
    return tokenizer


def _before_language(processor: Any, languages: Mapping[str, int]) -> tuple[int, ...]:
    """What a tokenizer puts before the piece of a language at the beginning of a text; nothing where it makes none of text.

    Args:
        processor: has ``encode``, and treats such pieces as text.
        languages: language code -> its piece.
    """
    for code, token_id in languages.items():
        ids: list[int] = processor.encode(f"<2{code}> a")
        return tuple(ids[: ids.index(token_id)]) if token_id in ids else ()
    return ()


def _whole_tokenizer(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> T5Tokenizer | None:
    """A ``tokenizer.json`` as it is, its sentinels and languages no text."""
    found: list[str] = []
    document, ids = read_json(directory / TOKENIZER_NAME, faults), tokenizer_ids(directory, settings, found)
    if document is None:
        return None
    # Before the library has the file: it panics at a template of two texts.
    around = _around_text(document.get("post_processor"), found)
    if around is None:
        faults += found
        return None
    kept = {token: i for token, i in ids.items() if not _SENTINEL.fullmatch(token)}
    languages = {language[1]: i for token, i in kept.items() if (language := _LANGUAGE.fullmatch(token))}
    sentinels = sorted(ids.keys() - kept.keys(), key=ids.__getitem__)
    path = directory / TOKENIZER_NAME
    spec = HuggingFaceTokenizerSpec(kind="hugging_face", tokenizer=TOKENIZER_NAME, special_tokens=sentinels)
    try:
        as_text = open_tokenizer(spec, {TOKENIZER_NAME: path})
        told = spec.model_copy(update={"special_tokens": [*(f"<2{code}>" for code in languages), *sentinels]})
        open_tokenizer(told, {TOKENIZER_NAME: path})
    except (OSError, ValueError) as error:
        faults += [*found, str(error)]
        return None
    faults += found
    if not kept:
        return None
    before, after = around
    end_id = ids.get(_END)
    if after not in ((), (end_id,)):
        faults.append(f"{TOKENIZER_NAME}: post_processor: puts {list(after)} after a text; only {_END} is supported")
    if end_id is not None and as_text.unknown_target_id == end_id:
        # What the library writes of a model whose unknown token is none of the first T5's.
        faults.append(f"{TOKENIZER_NAME}: unknown text becomes {_END}; put the model's {SENTENCEPIECE_NAME} there")
    # A token that the file adds is cut out of a text before anything else is done to it.
    is_added = {token.get("content") for token in document.get("added_tokens") or [] if isinstance(token, dict)}
    in_text = {code: i for code, i in languages.items() if f"<2{code}>" not in is_added}
    return T5Tokenizer(
        spec=told,
        files={TOKENIZER_NAME: path},
        size=1 + max(kept.values()),
        languages=languages,
        source_prefix=(*before, *_before_language(as_text, in_text)),
        source_ends_with_eos=bool(after),
        end_id=end_id,
    )


def _around_text(processor: Any, faults: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The ids that a ``post_processor`` puts before and after a text; None after a fault."""
    if processor is None:
        return (), ()
    try:
        if processor["type"] != "TemplateProcessing":
            raise ValueError(processor["type"])
        if [part["Sequence"]["id"] for part in processor["single"] if "Sequence" in part] != ["A"]:
            raise ValueError("no template of one text")
        around: tuple[list[int], list[int]] = ([], [])
        is_after = False
        for part in processor["single"]:
            if "Sequence" in part:
                is_after = True
            else:
                around[is_after].extend(processor["special_tokens"][part["SpecialToken"]["id"]]["ids"])
    except (KeyError, TypeError, ValueError):
        faults.append(f"{TOKENIZER_NAME}: post_processor: is not supported, only a template of one text")
        return None
    return tuple(around[0]), tuple(around[1])
