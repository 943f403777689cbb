"""The vocabularies inside OpenNMT-py's checkpoints, of all versions.

Version 3 has lists of tokens, ``src`` and ``tgt``. Before, they were objects of torchtext and of OpenNMT-py around it: a
``TextMultiField`` a side, whose first field is that of the tokens (1 and 2), a list of (name, ``Field``) a side (0.7), or one
list of (name, ``Vocab``) (before 0.7). Knows these and which classes they are of; loads none of them (``stand_ins.py``), and
does not know the rest of a checkpoint (``opennmt_py.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.checkpoint.stand_ins import attribute, is_empty, is_stand_in
from export.checkpoint.vocabulary import END_TOKEN, UNKNOWN_TOKEN, Vocabularies

PADDING_TOKEN = "<blank>"
_START_TOKEN = "<s>"

_MULTI_FIELD = "onmt.inputters.text_dataset.TextMultiField"
_FIELD, _VOCAB = "torchtext.data.field.Field", "torchtext.vocab.Vocab"
# Classes and functions of which a checkpoint may hold objects, or which such an object may name.
CLASSES = (
    _MULTI_FIELD,
    _FIELD,
    _VOCAB,
    "functools.partial",
    "onmt.inputters.inputter.AlignField",
    "onmt.inputters.inputter._feature_tokenize",
    "onmt.inputters.inputter.make_src",
    "onmt.inputters.inputter.make_tgt",
    "onmt.inputters.inputter.parse_align_idx",
    "onmt.inputters.text_dataset._feature_tokenize",
    "torchtext.data.field.LabelField",
    "torchtext.data.field.RawField",
    "torchtext.data.utils._split_tokenizer",
    "torchtext.vocab._default_unk_index",
)


@dataclass(frozen=True, slots=True)
class _Side:
    tokens: list[str]
    # What a sequence starts and ends with, where the file says so.
    start: str | None = None
    end: str | None = None


def read_vocabularies(stored: Any, file_name: str, faults: list[str]) -> tuple[Vocabularies | None, str]:
    """Vocabularies and the token that a target starts with; None after a fault, which goes to ``faults``.

    Args:
        stored: what the checkpoint has under ``vocab``.
        file_name: for the faults.
        faults: of the whole checkpoint so far.
    """
    found: list[str] = []
    sides = _by_name(stored)
    source, target = (_side(name, sides.get(name), found) for name in ("src", "tgt"))
    if sides.get("src_feats") is not None and not is_empty(sides["src_feats"]):
        found.append("src_feats: source features are not supported")
    if sides.get("data_task", "seq2seq") != "seq2seq":
        found.append("data_task: is not supported, only 'seq2seq'")
    start = sides.get("decoder_start_token", target.start if target and target.start else _START_TOKEN)
    if not isinstance(start, str):
        found.append("decoder_start_token: is no text")
    elif source and target:
        found += _faults(source, target, start)
    if found or source is None or target is None:
        faults += [f"{file_name}: vocab: {fault}" for fault in found]
        return None, ""
    special_tokens = tuple(dict.fromkeys((PADDING_TOKEN, _START_TOKEN, END_TOKEN, UNKNOWN_TOKEN, start)))
    source_ids, target_ids = ({token: i for i, token in enumerate(side.tokens)} for side in (source, target))
    return Vocabularies(source=source_ids, target=target_ids, special_tokens=special_tokens), start


def _by_name(stored: Any) -> Mapping[Any, Any]:
    """The sides by their names; none where there is no such thing."""
    if isinstance(stored, dict):
        return stored
    return {pair[0]: pair[1] for pair in stored if _is_pair(pair)} if isinstance(stored, list) else {}


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _side(name: str, stored: Any, found: list[str]) -> _Side | None:
    """What a side holds, from the outermost object to the tokens; None after a fault."""
    if is_stand_in(stored, _MULTI_FIELD):
        stored = attribute(stored, "fields")
    if isinstance(stored, list) and stored and all(map(_is_pair, stored)):
        if len(stored) > 1:
            found.append(f"{name}: holds {len(stored)} fields; features of a token are not supported")
            return None
        stored = stored[0][1]
    marks: dict[str, str | None] = {"start": None, "end": None}
    if is_stand_in(stored, _FIELD):
        tokens = {"start": attribute(stored, "init_token"), "end": attribute(stored, "eos_token")}
        marks = {mark: token if isinstance(token, str) else None for mark, token in tokens.items()}
        stored = attribute(stored, "vocab")
    if is_stand_in(stored, _VOCAB):
        stored = attribute(stored, "itos")
    if not isinstance(stored, list) or not stored or not all(isinstance(token, str) for token in stored):
        found.append(f"{name}: has no list of tokens, nor an object of torchtext with one")
        return None
    return _Side(stored, **marks)


def _faults(source: _Side, target: _Side, start: str) -> list[str]:
    found = []
    for name, tokens, needed in (
        ("src", source.tokens, (UNKNOWN_TOKEN,)),
        ("tgt", target.tokens, (UNKNOWN_TOKEN, END_TOKEN, start)),
    ):
        known = set(tokens)
        found += [f"{name}: has no {token!r}" for token in needed if token not in known]
        found += [f"{name}: a token is there twice"] if len(known) < len(tokens) else []
    found += [f"src: sequences with {token!r} around them are not supported" for token in (source.start, source.end) if token]
    if target.end not in (None, END_TOKEN):
        found.append(f"tgt: ends in {target.end!r}; only {END_TOKEN!r} is supported")
    ids_in_both = [target.tokens.index(token) for token in (END_TOKEN, PADDING_TOKEN) if token in target.tokens]
    size = len(source.tokens)
    return found + [f"src: {size} tokens are too few beside token {i} of tgt" for i in ids_in_both if i >= size]
