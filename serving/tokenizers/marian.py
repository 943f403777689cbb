"""SentencePiece models and vocabularies that number the pieces anew.

OPUS-MT models have them; so have M2M100, NLLB, mBART and fairseq, whose importers write such a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sentencepiece

from serving.manifest import MarianTokenizerSpec
from serving.tokenizers.base import (
    TokenizerFiles,
    check_special_tokens,
    contents_of,
    forms_of,
    known_ids,
    read_vocabulary,
    vocabulary_faults,
    without_incomplete_character,
    without_tokens,
)
from serving.tokenizers.sentence_piece import SPACE, load_model

# Tokens of a vocabulary that are no text in any.
_UNKNOWN, _END = "<unk>", "</s>"
_MARKERS = frozenset((_UNKNOWN, _END, "<s>", "<pad>"))


class MarianTokenizer:
    """A SentencePiece model for each side and vocabularies that number the pieces anew, as OPUS-MT models have them.

    Ids and text are those of Hugging Face's ``MarianTokenizer``, except that text is only text: there, ``</s>`` or ``<pad>``
    anywhere and ``>>deu<<`` at the start of a text become the tokens of that name. Any number of threads may use it.
    """

    def __init__(
        self,
        source: sentencepiece.SentencePieceProcessor,
        target: sentencepiece.SentencePieceProcessor,
        source_vocabulary: Mapping[str, int],
        target_vocabulary: Mapping[str, int],
        special_tokens: Sequence[str] = (),
    ) -> None:
        """From loaded models and vocabularies, piece -> id, which have ``<unk>``; see ``load``."""
        self._source = source
        self._target = target
        self._largest_ids = max(source_vocabulary.values()), max(target_vocabulary.values())
        self._end_ids = {"source": source_vocabulary.get(_END), "target": target_vocabulary.get(_END)}
        self._unknown_id = source_vocabulary[_UNKNOWN]
        self._unknown_target_id = target_vocabulary[_UNKNOWN]
        # What a model of several target languages is told which one by; in text they are text.
        self.language_tokens = {token: i for token, i in source_vocabulary.items() if _is_language_token(token)}
        # Without what is no text: a model's pieces, or what it makes of characters it does not know, may spell a marker.
        self._ids = without_tokens(source_vocabulary, (*_MARKERS, *self.language_tokens, *special_tokens))
        # By the source model's own numbers; a list, since to make an array of a sentence's numbers takes longer than this does.
        pieces = map(source.id_to_piece, range(source.get_piece_size()))
        self._ids_by_number = [self._ids.get(piece, self._unknown_id) for piece in pieces]
        # Languages like >>deu<< have text, as in Hugging Face's; a target has none of them.
        self._pieces = {i: piece for piece, i in without_tokens(target_vocabulary, (*_MARKERS, *special_tokens)).items()}
        self._target_ids = {piece: i for i, piece in self._pieces.items() if not _is_language_token(piece)}
        self._spelled = {i: piece for piece, i in target_vocabulary.items()}

    @classmethod
    def load(cls, spec: MarianTokenizerSpec, files: TokenizerFiles) -> MarianTokenizer:
        """Load models and vocabularies; one file for both sides is loaded once.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no SentencePiece model, or one whose text cannot be told piece by piece, or no vocabulary; all
                such are named. A special token that no vocabulary has.
        """
        faults: list[str] = []
        loaded: dict[str, Any] = {}
        loaders: list[tuple[Callable[[str, bytes], Any], tuple[str, ...]]] = [
            (load_model, (spec.source_model, spec.target_model)),
            (_load_vocabulary, (spec.source_vocabulary, spec.target_vocabulary)),
        ]
        for load, names in loaders:
            for name in dict.fromkeys(names):
                try:
                    loaded[name] = load(name, contents_of(files, name))
                except ValueError as error:
                    faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))
        vocabularies = loaded[spec.source_vocabulary], loaded[spec.target_vocabulary]
        check_special_tokens(spec.special_tokens, *vocabularies)
        return cls(loaded[spec.source_model], loaded[spec.target_model], *vocabularies, spec.special_tokens)

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """See ``ModelTokenizer``; a model may have more tokens than the vocabulary has pieces, and these have no text."""
        return vocabulary_faults(*self._largest_ids, source_vocab_size, target_vocab_size)

    def end_faults(self, eos_id: int) -> list[str]:
        """Why ``eos_id`` cannot end sources and targets; empty when it can: ``</s>`` has this id on both sides."""
        return [
            f"tokenizer: {_END} has id {found} in the {side} vocabulary, the model's end-of-sentence token is {eos_id}"
            for side, found in self._end_ids.items()
            if found != eos_id
        ]

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``. Markers and language tokens spelled out in the text are text, never tokens."""
        text.encode()  # as for SentencePiece alone
        numbers: list[int] = self._source.encode(text)
        if self._source.unk_id() not in numbers:
            return [self._ids_by_number[number] for number in numbers]
        # Characters that the source model does not know may be pieces of the vocabulary all the same, the target model's.
        pieces: list[str] = self._source.encode(text, out_type=str)
        return [self._ids.get(piece, self._unknown_id) for piece in pieces]

    @property
    def unknown_target_id(self) -> int:
        """See ``Tokenizer``."""
        return self._unknown_target_id

    def encode_target(self, text: str) -> list[int] | None:
        """See ``Tokenizer.encode_target``."""
        return known_ids(self._encode_target(text), self._unknown_target_id)

    def target_forms(self, text: str) -> list[list[int]]:
        """See ``Tokenizer.target_forms``."""
        return forms_of(self._encode_target, text, self._unknown_target_id)

    def _encode_target(self, text: str) -> list[int]:
        text.encode()  # as ``encode``
        pieces: list[str] = self._target.encode(text, out_type=str)
        return [self._target_ids.get(piece, self._unknown_target_id) for piece in pieces]

    def target_id(self, token: str) -> int | None:
        """See ``Tokenizer.target_id``."""
        return self._target_ids.get(token)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``. The unknown token has no text; a piece that the target model does not have is its own."""
        return self.decode_with(ids, {})

    def decode_with(self, ids: Sequence[int], instead: Mapping[int, str]) -> str:
        """See ``Tokenizer.decode_with``."""
        pieces = [piece for place, i in enumerate(ids) if (piece := instead.get(place) or self._pieces.get(i))]
        text: str = self._target.decode_pieces(pieces)
        # SentencePiece leaves its space symbol in pieces that it does not know. No other white space is stripped: before its last
        # byte came, one made of bytes was a replacement character, and the spaces in front of that were told.
        return text.replace(SPACE, " ").strip(" ")

    def source_pieces(self, text: str) -> list[str]:
        """See ``Tokenizer.source_pieces``."""
        text.encode()  # as ``encode``
        pieces: list[str] = self._source.encode(text, out_type=str)
        return pieces

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """See ``Tokenizer.target_pieces``."""
        return [self._spelled.get(i, "") for i in ids]

    def certain_text(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.certain_text``."""
        return without_incomplete_character(self.decode(ids))


def _load_vocabulary(name: str, contents: bytes) -> dict[str, int]:
    vocabulary = read_vocabulary(name, contents)
    if _UNKNOWN not in vocabulary:
        raise ValueError(f"{name}: has no {_UNKNOWN}")
    return vocabulary


def _is_language_token(piece: str) -> bool:
    return piece.startswith(">>") and piece.endswith("<<") and len(piece) > len(">><<")
