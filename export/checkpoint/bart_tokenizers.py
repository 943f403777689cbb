"""Tokenizers of BART and its descendants: which files hold one, and which ids its pieces and the tokens of languages have.

Does not know any architecture, nor where in a source or target a model wants a language's token (``bart.py``, ``m2m100.py``).

**fairseq** (mBART, mBART-50, NLLB) puts ``<s>``, ``<pad>``, ``</s>``, ``<unk>`` before the pieces, and tokens of languages after
them. A SentencePiece model starts with ``<unk>``, ``<s>``, ``</s>`` and numbers its pieces one lower. No token of a language is
in the vocabulary that is written here: no text makes one, and none has a text.

**Pegasus** has 103 tokens of its training between ``</s>`` and the pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sentencepiece

from export.checkpoint.hugging_face import (
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    added_tokens,
    read_json,
    special_tokens,
    tokenizer_ids,
)
from serving.manifest import AnyTokenizerSpec, HuggingFaceTokenizerSpec, MarianTokenizerSpec

PEGASUS_NAME = "spiece.model"
VOCAB_NAME = "vocab.json"
MERGES_NAME = "merges.txt"
SENTENCEPIECE_NAME = "sentencepiece.bpe.model"
VOCABULARY_NAME = "vocabulary.json"

# Tokens of languages in their order, for directories that do not list them; mBART-50 has both.
MBART_LANGUAGES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX ro_RO "
    "ru_RU si_LK tr_TR vi_VN zh_CN"
)
MBART50_LANGUAGES = (
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN "
    "th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
)

_START, _END = "<s>", "</s>"
_FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_FIRST_PIECES = ("<unk>", "<s>", "</s>")
_FIRST_PEGASUS_PIECES = ("<pad>", "</s>", "<unk>")
# Pieces that keep their numbers, and by how much the others' are raised.
_PEGASUS_KEPT = 2
_PEGASUS_OFFSET = 103
_MOST_PEGASUS_OFFSET = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a reader found of a tokenizer."""

    spec: AnyTokenizerSpec
    # By the names that ``spec`` uses.
    files: dict[str, Path | bytes]
    # Language code -> its token; empty for a model that is told no language.
    languages: dict[str, int] = field(default_factory=dict)
    # Whether a source has its language's token at its very end, and not before its text.
    language_is_last: bool = False
    # Ids that every source starts with.
    source_prefix: tuple[int, ...] = ()
    # That of ``</s>``; None: it is not there.
    end_id: int | None


def fairseq_tokenizer(
    directory: Path,
    settings: Mapping[str, Any],
    code: re.Pattern[str],
    faults: list[str],
    *,
    known: Sequence[str] = (),
    language_is_last: bool = False,
) -> TokenizerParts | None:
    """The tokenizer of mBART, mBART-50 or NLLB; None after a fault.

    Args:
        directory: has ``sentencepiece.bpe.model``, or else ``tokenizer.json``.
        settings: what ``tokenizer_config.json`` holds.
        code: how a language's token looks; its first group is the language's code.
        faults: of the whole checkpoint so far.
        known: tokens of languages in their order, for a directory that lists none.
        language_is_last: whether a source ends in its language's token.
    """
    if not (directory / SENTENCEPIECE_NAME).is_file() and (directory / TOKENIZER_NAME).is_file():
        parts = _whole_tokenizer(tokenizer_ids(directory, settings, faults), directory / TOKENIZER_NAME, code)
    else:
        pieces = sentencepiece_pieces(directory / SENTENCEPIECE_NAME, faults)
        if pieces is None:
            return None
        if tuple(pieces[: len(_FIRST_PIECES)]) != _FIRST_PIECES:
            faults.append(f"{SENTENCEPIECE_NAME}: starts with {pieces[:3]}; only {', '.join(_FIRST_PIECES)} is supported")
            return None
        tokens = [*_FIRST_TOKENS, *pieces[len(_FIRST_PIECES) :]]
        added, special = added_tokens(directory, settings, faults), special_tokens(directory, settings, faults)
        if not any(map(code.fullmatch, (*added, *special))):
            special = list(known)
        languages = language_ids(code, added, special, first_id=len(tokens))
        vocabulary = {token: i for i, token in enumerate(tokens) if not code.fullmatch(token)}
        parts = renumbered(directory / SENTENCEPIECE_NAME, vocabulary, languages)
    if not parts.languages:
        faults.append(f"{TOKENIZER_CONFIG_NAME}: no token of a language is listed, nor in any other file")
    return replace(parts, language_is_last=language_is_last)


def renumbered(model: Path, vocabulary: Mapping[str, int], languages: dict[str, int]) -> TokenizerParts:
    """A SentencePiece model with a vocabulary that gives each piece its id."""
    spec = MarianTokenizerSpec(
        kind="marian",
        source_model=model.name,
        target_model=model.name,
        source_vocabulary=VOCABULARY_NAME,
        target_vocabulary=VOCABULARY_NAME,
    )
    contents = json.dumps(vocabulary, ensure_ascii=False).encode()
    files: dict[str, Path | bytes] = {model.name: model, VOCABULARY_NAME: contents}
    return TokenizerParts(spec=spec, files=files, languages=languages, end_id=vocabulary.get(_END))


def language_ids(code: re.Pattern[str], added: Mapping[str, int], special: list[str], *, first_id: int) -> dict[str, int]:
    """Language code -> its token's id: the one that is stated or else, in the order of ``special``, from ``first_id`` on."""
    ordered = [token for token in special if code.fullmatch(token)]
    ids = {token: first_id + i for i, token in enumerate(ordered)}
    ids |= {token: token_id for token, token_id in added.items() if code.fullmatch(token)}
    return {code.sub(r"\1", token): token_id for token, token_id in sorted(ids.items(), key=lambda item: item[1])}


def sentencepiece_pieces(path: Path, faults: list[str]) -> list[str] | None:
    """The pieces of a SentencePiece model in order; None after a fault."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except FileNotFoundError:
        faults.append(f"{path.name}: is missing")
    except (OSError, RuntimeError) as error:
        faults.append(f"{path.name}: is no SentencePiece model: {error}")
    else:
        return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return None


def pegasus_tokenizer(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> TokenizerParts | None:
    """Pegasus' tokenizer, of ``spiece.model`` or else ``tokenizer.json``; None after a fault."""
    if not (directory / PEGASUS_NAME).is_file() and (directory / TOKENIZER_NAME).is_file():
        return _whole_tokenizer(tokenizer_ids(directory, settings, faults), directory / TOKENIZER_NAME)
    pieces = sentencepiece_pieces(directory / PEGASUS_NAME, faults)
    offset = settings.get("offset", _PEGASUS_OFFSET)
    if type(offset) is not int or not 0 <= offset <= _MOST_PEGASUS_OFFSET:
        faults.append(f"{TOKENIZER_CONFIG_NAME}: offset: {offset!r} is not supported, only 0 to {_MOST_PEGASUS_OFFSET}")
    elif pieces is not None and tuple(pieces[: len(_FIRST_PEGASUS_PIECES)]) != _FIRST_PEGASUS_PIECES:
        faults.append(f"{PEGASUS_NAME}: starts with {pieces[:3]}; only {', '.join(_FIRST_PEGASUS_PIECES)} is supported")
    elif pieces is not None:
        # Padding and the end keep their places.
        vocabulary = {piece: i if i < _PEGASUS_KEPT else i + offset for i, piece in enumerate(pieces)}
        return renumbered(directory / PEGASUS_NAME, vocabulary, {})
    return None


def byte_level_tokenizer(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> TokenizerParts | None:
    """BART's tokenizer, of ``tokenizer.json`` or else ``vocab.json`` and ``merges.txt``; None after a fault.

    A source starts with ``<s>``.
    """
    if (directory / TOKENIZER_NAME).is_file():
        ids = tokenizer_ids(directory, settings, faults)
        return _started(_whole_tokenizer(ids, directory / TOKENIZER_NAME), ids, TOKENIZER_NAME, faults)
    vocabulary = read_json(directory / VOCAB_NAME, faults)
    merges = _read_merges(directory / MERGES_NAME, faults)
    if vocabulary is None and not (directory / VOCAB_NAME).is_file():
        faults.append(f"{VOCAB_NAME}: is missing, and so is {TOKENIZER_NAME}")
    if vocabulary is None or merges is None:
        return None
    if bad := [piece for piece, i in vocabulary.items() if type(i) is not int or i < 0]:
        faults.append(f"{VOCAB_NAME}: {bad[0][:40]!r}: has no id")
        return None
    document = _byte_level_document(vocabulary, merges, bool(settings.get("add_prefix_space")))
    contents = json.dumps(document, ensure_ascii=False).encode()
    return _started(_whole_tokenizer(vocabulary, contents), vocabulary, VOCAB_NAME, faults)


def _byte_level_document(vocabulary: Mapping[str, int], merges: list[list[str]], add_prefix_space: bool) -> dict[str, Any]:
    """A ``tokenizer.json`` of byte-level pieces and merges."""
    level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}
    special = [
        {
            "id": vocabulary[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in (*_FIRST_TOKENS, "<mask>")
        if token in vocabulary
    ]
    return {
        "version": "1.0",
        "added_tokens": sorted(special, key=lambda token: token["id"]),
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "unk_token": None, "fuse_unk": False, "vocab": vocabulary, "merges": merges},
    }


def _read_merges(path: Path, faults: list[str]) -> list[list[str]] | None:
    """Pairs of pieces, those that are merged first first; None after a fault."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        faults.append(f"{path.name}: is missing, and so is {TOKENIZER_NAME}")
        return None
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path.name}: cannot be read: {error}")
        return None
    merges = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    if any(len(pair) != 2 for pair in merges):
        faults.append(f"{path.name}: has lines that are no two pieces")
        return None
    return merges


def _started(parts: TokenizerParts, ids: Mapping[str, int], name: str, faults: list[str]) -> TokenizerParts | None:
    """With the start token in front of every source; None after a fault."""
    if _START not in ids:
        faults.append(f"{name}: has no {_START}")
        return None
    return replace(parts, source_prefix=(ids[_START],))


def _whole_tokenizer(ids: Mapping[str, int], file: Path | bytes, code: re.Pattern[str] | None = None) -> TokenizerParts:
    """A ``tokenizer.json`` as the tokenizer, given the ids of its tokens."""
    languages = language_ids(code, ids, [], first_id=0) if code else {}
    tokens = [token for token in ids if code and code.fullmatch(token)]
    spec = HuggingFaceTokenizerSpec(kind="hugging_face", tokenizer=TOKENIZER_NAME, special_tokens=tokens)
    return TokenizerParts(spec=spec, files={TOKENIZER_NAME: file}, languages=languages, end_id=ids.get(_END))
