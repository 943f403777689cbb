"""A ``tokenizer.json`` of Hugging Face's tokenizers library, and that library.

Knows which of a file's tokens are no text, and of which of its decoders the text is certain as tokens come. The file's own rules
for special tokens around a text are not used: who asks puts them there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from serving.manifest import HuggingFaceTokenizerSpec
from serving.tokenizers.base import (
    TokenizerFiles,
    contents_of,
    forms_of,
    known_ids,
    missing_package,
    vocabulary_faults,
    without_incomplete_character,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

# Decoders whose text a further token only appends to, but for bytes of a character that is not complete.
_APPENDING = frozenset(("ByteLevel", "Metaspace", "WordPiece"))
# A token that stands for a byte, where the decoder knows such; a character is what a run of them makes together.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Characters that no vocabulary has.
_ODD_TEXT = "\U0010fffd \0"


class HuggingFaceTokenizer:
    """One tokenizer for both sides. Any number of threads may use it."""

    def __init__(self, library: Library, special_ids: frozenset[int], unknown_id: int | None, decoder: Mapping[str, Any] | None):
        """From the library's tokenizer, and what it does not tell of itself; see ``load``."""
        self._library = library
        vocabulary = library.get_vocab(with_added_tokens=True)
        self._text_ids = frozenset(vocabulary.values()) - special_ids
        # Special tokens have no text, so that a model may lack some, as BART lacks its pre-training's <mask>.
        self._largest_id = max(self._text_ids, default=0)
        # What text becomes that spells a special token as the model's own pieces do.
        self._unknown_id = unknown_id
        self._instead = [] if unknown_id is None else [unknown_id]
        self._never_of_text = special_ids - set(self._instead)
        self._is_appending = _is_appending(decoder)
        self._has_byte_runs = _has_byte_runs(decoder)
        self._byte_ids = frozenset(i for token, i in vocabulary.items() if _BYTE.fullmatch(token))

    @classmethod
    def load(cls, spec: HuggingFaceTokenizerSpec, files: TokenizerFiles) -> HuggingFaceTokenizer:
        """Load the file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such tokenizer, a special token is not in it, or the library is not installed.
        """
        try:
            from tokenizers import AddedToken, Tokenizer
        except ImportError as error:
            raise missing_package(spec.kind, error) from error
        contents = contents_of(files, spec.tokenizer)
        try:
            document = from_json(contents)
            library = Tokenizer.from_buffer(contents)
        except ValueError as error:
            raise ValueError(f"{spec.tokenizer}: is no tokenizer: {error}") from error
        decoder = document.get("decoder")
        if any(step["type"] == "Strip" and step["stop"] for step in _steps(decoder)):
            raise ValueError(f"{spec.tokenizer}: its decoder takes characters from the end; such are not supported")
        if unknown := [token for token in spec.special_tokens if library.token_to_id(token) is None]:
            raise ValueError(f"special_tokens: {', '.join(map(repr, unknown))}: not in {spec.tokenizer}")
        if not library.get_vocab_size(with_added_tokens=True):
            raise ValueError(f"{spec.tokenizer}: has no tokens")
        library.no_truncation()
        library.no_padding()
        # Also those that the file only adds: the text that spells them is cut like any other.
        library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in spec.special_tokens])
        library.encode_special_tokens = True
        added = library.get_added_tokens_decoder()
        special_ids = frozenset(i for i, token in added.items() if token.special)
        tokenizer = cls(library, special_ids, _unknown_id(library, document["model"]), decoder)
        try:
            tokenizer.encode(_ODD_TEXT)
            tokenizer.decode([])
            tokenizer.decode(sorted(tokenizer._text_ids))
        except Exception as error:  # of a model without a token for unknown text; the library raises nothing narrower
            raise ValueError(f"{spec.tokenizer}: does not take all text: {error}") from error
        return tokenizer

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """See ``ModelTokenizer``."""
        return vocabulary_faults(self._largest_id, self._largest_id, source_vocab_size, target_vocab_size)

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``. Special tokens spelled out in text are text, or unknown if the model has no other pieces."""
        text.encode()  # the library's own complaint about a lone surrogate is another error
        if not text or text.isspace():
            return []  # most models have a token for white space
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        if self._never_of_text.isdisjoint(ids):
            return ids
        return [j for i in ids for j in (self._instead if i in self._never_of_text else [i])]

    @property
    def unknown_target_id(self) -> int | None:
        """See ``Tokenizer``."""
        return self._unknown_id

    def encode_target(self, text: str) -> list[int] | None:
        """See ``Tokenizer.encode_target``."""
        return known_ids(self.encode(text), self._unknown_id)

    def target_forms(self, text: str) -> list[list[int]]:
        """See ``Tokenizer.target_forms``."""
        return forms_of(self.encode, text, self._unknown_id)

    def target_id(self, token: str) -> int | None:
        """See ``Tokenizer.target_id``."""
        found: int | None = self._library.token_to_id(token)
        return found if found in self._text_ids and found != self._unknown_id else None

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        return self._library.decode(self._of_text(ids), skip_special_tokens=False)

    def decode_with(self, ids: Sequence[int], instead: Mapping[int, str]) -> str:
        """See ``Tokenizer.decode_with``."""
        spelled = zip(range(len(ids)), ids, self.target_pieces(ids), strict=True)
        pieces = [instead.get(place, piece) for place, i, piece in spelled if place in instead or i in self._text_ids]
        decoder = self._library.decoder
        text: str = " ".join(pieces) if decoder is None else decoder.decode(pieces)
        return text

    def source_pieces(self, text: str) -> list[str]:
        """See ``Tokenizer.source_pieces``."""
        text.encode()  # as ``encode``
        if not text or text.isspace():
            return []
        encoding = self._library.encode(text, add_special_tokens=False)
        unknown = {*self._never_of_text, *self._instead}
        return [
            text[slice(*offsets)] if i in unknown else piece
            for i, piece, offsets in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
            if i not in self._never_of_text or self._instead
        ]

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """See ``Tokenizer.target_pieces``."""
        return [self._library.id_to_token(i) or "" for i in ids]

    def certain_text(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.certain_text``. None of a decoder that may change what it made of earlier tokens."""
        if self._is_appending:
            return without_incomplete_character(self.decode(ids))
        if not self._has_byte_runs:
            return ""
        known = self._of_text(ids)
        while known and known[-1] in self._byte_ids:
            known.pop()
        return self._library.decode(known, skip_special_tokens=False)

    def _of_text(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._text_ids]


def _unknown_id(library: Library, model: Mapping[str, Any]) -> int | None:
    """The id of unknown text; None where there is none, as where all text is bytes."""
    unknown_id = model.get("unk_id")
    if isinstance(unknown_id, int):
        return unknown_id
    unknown = model.get("unk_token")
    return library.token_to_id(unknown) if isinstance(unknown, str) else None


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What a decoder does, one after the other."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for one in decoder["decoders"] for step in _steps(one)]
    return [decoder]


def _is_appending(decoder: Mapping[str, Any] | None) -> bool:
    """Whether a further token only appends to the text; without a decoder there is a space between each two."""
    return decoder is None or decoder["type"] in _APPENDING


def _has_byte_runs(decoder: Mapping[str, Any] | None) -> bool:
    """Whether a further token only appends to the text of a list that ends in none for a byte.

    Such decoders rewrite single tokens, then make characters of runs of bytes, and take white space from the beginning.
    """
    steps = [step["type"] for step in _steps(decoder)]
    for last in ("Strip", "Fuse", "ByteFallback"):
        if steps and steps[-1] == last:
            steps.pop()
    return decoder is not None and all(step == "Replace" for step in steps)
