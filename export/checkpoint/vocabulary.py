"""From a model's vocabularies and what lies beside it to a tokenizer, or to text that is tokens.

For formats that number tokens themselves and leave it to the user how text becomes tokens (Marian, fairseq, OpenNMT-py,
CTranslate2). Knows which file names are usual for which kind; does not know any model format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.hugging_face import TOKENIZER_NAME, tokenizer_ids
from serving.manifest import (
    AnyTokenizerSpec,
    HuggingFaceTokenizerSpec,
    LanguageTokens,
    MarianTokenizerSpec,
    MosesSpec,
    SubwordNmtTokenizerSpec,
    TokensTokenizerSpec,
)
from serving.tokenizers import open_tokenizer

UNKNOWN_TOKEN, END_TOKEN = "<unk>", "</s>"
# In the bundle; what the checkpoint has is of another form.
_VOCABULARY_NAME, _SOURCE_VOCABULARY_NAME, _TARGET_VOCABULARY_NAME = (
    "vocabulary.json",
    "source_vocabulary.json",
    "target_vocabulary.json",
)
# Usual names, the most telling first: (source, target).
_SENTENCEPIECE_NAMES = (
    ("source.spm", "target.spm"),
    *((name, name) for name in ("sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm.bpe.model")),
)
_CODES_NAMES = (
    ("source.bpe", "target.bpe"),
    ("source.bpe",),
    # Of both sides.
    *((name, name) for name in ("bpecodes", "bpe.codes", "codes.bpe", "bpe_codes", "codes")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabularies:
    """Token -> id of both sides; may be one and the same."""

    source: Mapping[str, int]
    target: Mapping[str, int]
    # Tokens of either that are no text.
    special_tokens: tuple[str, ...]

    def language_tokens(self) -> LanguageTokens | None:
        """Of a model that is told its target language by a source token like ``>>deu<<``; None where there is no choice."""
        ids = {token[2:-2]: i for token, i in self.source.items() if token.startswith(">>") and token.endswith("<<")}
        ids.pop("", None)
        return LanguageTokens(tokens=ids, before_source="target", before_target=False) if len(ids) > 1 else None

    def have(self, token: str, token_id: int) -> bool:
        """Whether a token has this id on both sides."""
        return self.source.get(token) == self.target.get(token) == token_id

    def faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """Why they do not fit a model's sizes, or lack a token that every model needs; empty when all is well."""
        found = [
            f"the {side} vocabulary has no {token}"
            for side, ids in (("source", self.source), ("target", self.target))
            for token in (UNKNOWN_TOKEN, END_TOKEN)
            if token not in ids
        ]
        return found + [
            f"the {side} vocabulary has ids up to {max(ids.values())}, the model's is of {size} tokens"
            for side, ids, size in (
                ("source", self.source, source_vocab_size),
                ("target", self.target, target_vocab_size),
            )
            if ids and max(ids.values()) >= size
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """A tokenizer for a bundle."""

    spec: AnyTokenizerSpec
    # By the names that ``spec`` uses.
    files: dict[str, Path | bytes]
    warnings: tuple[str, ...]


def choose_tokenizer(
    directory: Path,
    vocabularies: Vocabularies,
    faults: list[str],
    *,
    sentencepiece: Iterable[tuple[str, str]] = (),
    codes: Iterable[str] = (),
    moses: MosesSpec | None = None,
) -> TokenizerChoice | None:
    """The tokenizer that lies beside a model; without one, text comes as tokens.

    SentencePiece comes first, then ``tokenizer.json`` where it numbers tokens as the model does, then byte-pair codes.

    Args:
        directory: where to look.
        vocabularies: of the model; without faults.
        faults: of the whole checkpoint so far; None is returned after another.
        sentencepiece: names of models (source, target) to look for before the usual ones.
        codes: names of byte-pair codes, of both sides, to look for before the usual ones.
        moses: how words are cut before byte-pair codes are applied, where the model says so.
    """
    files, source_name, target_name = _vocabulary_files(vocabularies)
    special_tokens = [token for token in vocabularies.special_tokens if token in {*vocabularies.source, *vocabularies.target}]
    unknown_id = vocabularies.source[UNKNOWN_TOKEN]
    spec: AnyTokenizerSpec
    warnings: tuple[str, ...] = ()
    models = _first_there(directory, (*sentencepiece, *_SENTENCEPIECE_NAMES))
    json_ids = tokenizer_ids(directory, {}, faults) if not models and (directory / TOKENIZER_NAME).is_file() else {}
    other = next((token for token, i in json_ids.items() if not vocabularies.have(token, i)), None)
    if models:
        spec = MarianTokenizerSpec(
            kind="marian",
            source_model=models[0],
            target_model=models[1],
            source_vocabulary=source_name,
            target_vocabulary=target_name,
            special_tokens=special_tokens,
        )
        files |= {name: directory / name for name in models}
    elif json_ids and other is None:
        known = [token for token in special_tokens if token in json_ids]
        spec = HuggingFaceTokenizerSpec(kind="hugging_face", tokenizer=TOKENIZER_NAME, special_tokens=known)
        files = {TOKENIZER_NAME: directory / TOKENIZER_NAME}
    elif found := _first_there(directory, (*((name, name) for name in codes), *_CODES_NAMES)):
        spec = SubwordNmtTokenizerSpec(
            kind="subword_nmt",
            source_codes=found[0],
            target_codes=found[1] if len(found) > 1 else None,
            source_vocabulary=source_name,
            target_vocabulary=target_name,
            unknown_id=unknown_id,
            special_tokens=special_tokens,
            moses=moses,
        )
        files |= {name: directory / name for name in found}
        if moses is None:
            warnings = (
                f"the model does not say how its text was cut into words before {found[0]} was applied; what has spaces between "
                "is taken as words. If it was trained on the output of a word tokenizer, give it text of that kind",
            )
    else:
        spec = TokensTokenizerSpec(
            kind="tokens",
            source_vocabulary=source_name,
            target_vocabulary=target_name,
            unknown_id=unknown_id,
            special_tokens=special_tokens,
        )
        warnings = (
            "there is no SentencePiece model, no tokenizer.json and no byte-pair codes beside the model: it takes and gives "
            "tokens with spaces between. Put its tokenizer's files beside it (source.spm and target.spm, "
            f"sentencepiece.bpe.model, or {TOKENIZER_NAME}) and export it again",
        )
    if other is not None:
        warnings = (*warnings, f"{TOKENIZER_NAME} is not taken: its {other!r} has id {json_ids[other]}, and another in the model")
    try:
        open_tokenizer(spec, files)
    except (OSError, ValueError) as error:
        faults.append(str(error))
        return None
    return TokenizerChoice(spec=spec, files=files, warnings=warnings)


def _vocabulary_files(vocabularies: Vocabularies) -> tuple[dict[str, Path | bytes], str, str]:
    source, target = (json.dumps(ids, ensure_ascii=False).encode() for ids in (vocabularies.source, vocabularies.target))
    if source == target:
        return {_VOCABULARY_NAME: source}, _VOCABULARY_NAME, _VOCABULARY_NAME
    return {_SOURCE_VOCABULARY_NAME: source, _TARGET_VOCABULARY_NAME: target}, _SOURCE_VOCABULARY_NAME, _TARGET_VOCABULARY_NAME


def _first_there(directory: Path, candidates: Iterable[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The first of the candidates whose names are all files of the directory."""
    for names in candidates:
        # A name from a checkpoint may be anything; nothing outside the directory is looked at.
        if all(name == Path(name).name and (directory / name).is_file() for name in names):
            return names
    return None
