"""What every tokenizer is, and what several of them read: files, and vocabularies in JSON.

Does not know any kind of tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pydantic_core import from_json

# What decoders put where bytes are no whole character, be it broken or not yet complete.
_REPLACEMENT = "\ufffd"
# A character that no vocabulary has: what comes before it makes no token together with what comes after.
_FOREIGN = "\U0010fffd"

# A tokenizer's files by the names that its spec uses: where one is, or its contents.
TokenizerFiles = Mapping[str, Path | bytes]


class Tokenizer(Protocol):
    """Text to source ids, target ids to text and back. Any number of threads may use one."""

    @property
    def unknown_target_id(self) -> int | None:
        """The target's token for text that it does not know; None where all text is known."""

    def encode(self, text: str) -> list[int]:
        """Source ids, without the end-of-sentence token; empty for text in which nothing is left to translate.

        Tokens that are no text, such as the end-of-sentence token or a language, never come of text, however it is spelled.

        Raises:
            UnicodeEncodeError: ``text`` holds a lone surrogate. Text that came as UTF-8 holds none.
        """

    def encode_target(self, text: str) -> list[int] | None:
        """Target ids that ``decode`` makes this text of, as the model would write it: white space and some characters normalized.

        None where the target vocabulary has no tokens for some of it, so that no target holds this text. As of ``encode``, tokens
        that are no text never come of it.

        Raises:
            UnicodeEncodeError: as ``encode``.
            ValueError: it only cuts sources; says why.
        """

    def target_forms(self, text: str) -> list[list[int]]:
        """The target ids of a text at the beginning, after a space and inside of a word, each once; none as ``encode_target``.

        A word may have other tokens in other places, as SentencePiece's ``\u2581dog`` and ``dog``.

        Raises:
            UnicodeEncodeError, ValueError: as ``encode_target``.
        """

    def target_id(self, token: str) -> int | None:
        """The id of a target token as the vocabulary spells it; None of one that it does not have, or that is no text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of target ids; tokens that are no text have none."""

    def decode_with(self, ids: Sequence[int], instead: Mapping[int, str]) -> str:
        """The text of target ids with pieces of a source, by their places among the ids, in the place of some."""

    def source_pieces(self, text: str) -> list[str]:
        """What ``encode`` cuts a text into, one for each id: as the vocabulary spells it, or as the text where that is unknown.

        Raises:
            UnicodeEncodeError: as ``encode``.
        """

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells target ids; empty where it has no such token."""

    def certain_text(self, ids: Sequence[int]) -> str:
        """How ``decode`` of these ids, and of any longer list that starts with them, begins: what no further token can change.

        A longer list has a certain text that begins with this one.
        """


class ModelTokenizer(Tokenizer, Protocol):
    """A tokenizer that came in files and belongs to one model."""

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """Why it does not fit a model's vocabularies; empty when it does."""


def without_incomplete_character(text: str) -> str:
    """Text without its trailing replacement characters: they may be bytes of a character whose others have not come."""
    return text.rstrip(_REPLACEMENT)


def known_ids(ids: list[int], unknown_id: int | None) -> list[int] | None:
    """Ids, or None where one is unknown."""
    return None if unknown_id in ids else ids


def forms_of(encode: Callable[[str], list[int]], text: str, unknown_id: int | None) -> list[list[int]]:
    """See ``Tokenizer.target_forms``; ``encode`` makes ``unknown_id`` of what it does not know."""
    forms = [encode(text)]
    if not forms[0]:
        return []  # blank; a space may be a token all the same
    foreign = encode(_FOREIGN)
    for before in (_FOREIGN, f"{_FOREIGN} "):
        ids = encode(before + text)
        if ids[: len(foreign)] == foreign:
            forms.append(ids[len(foreign) :])
    return [list(form) for form in dict.fromkeys(map(tuple, forms)) if form and unknown_id not in form]


def contents_of(files: TokenizerFiles, name: str) -> bytes:
    """What a file holds.

    Raises:
        OSError: it cannot be read.
    """
    found = files[name]
    return found if isinstance(found, bytes) else found.read_bytes()


def read_vocabulary(name: str, contents: bytes) -> dict[str, int]:
    """Tokens and their ids, of a file in JSON.

    Raises:
        ValueError: the file holds no such thing; names it.
    """
    try:
        vocabulary = from_json(contents)
    except ValueError as error:
        raise ValueError(f"{name}: is not JSON: {error}") from error
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise ValueError(f"{name}: is no vocabulary: an object of pieces and their ids, none below 0")
    if not vocabulary:
        raise ValueError(f"{name}: is an empty vocabulary")
    return vocabulary


def check_special_tokens(special_tokens: Iterable[str], *vocabularies: Collection[str]) -> None:
    """That each is known on some side; one that is spelled otherwise would go on being text.

    Raises:
        ValueError: names those that are not.
    """
    unknown = [token for token in special_tokens if not any(token in vocabulary for vocabulary in vocabularies)]
    if unknown:
        raise ValueError(f"special_tokens: {', '.join(map(repr, unknown))}: in no vocabulary")


def without_tokens(vocabulary: Mapping[str, int], special_tokens: Iterable[str]) -> dict[str, int]:
    """A vocabulary of text alone. By id: a token that shares the id of a special one is as special."""
    special_ids = {vocabulary[token] for token in special_tokens if token in vocabulary}
    return {token: i for token, i in vocabulary.items() if i not in special_ids}


def same_token(token_id: int, vocabulary: Mapping[str, int], other: Mapping[str, int]) -> int | None:
    """The id that a token of one vocabulary has in the other; None where it is not there."""
    return next((other[token] for token, i in vocabulary.items() if i == token_id and token in other), None)


def vocabulary_faults(
    largest_source_id: int, largest_target_id: int, source_vocab_size: int, target_vocab_size: int
) -> list[str]:
    """Ids that a model does not have; it may have more tokens than a vocabulary, and these have no text."""
    return [
        f"tokenizer: its {side} vocabulary has ids up to {largest}, the model's vocabulary is of {size}"
        for side, largest, size in (
            ("source", largest_source_id, source_vocab_size),
            ("target", largest_target_id, target_vocab_size),
        )
        if largest >= size
    ]


def missing_package(kind: str, error: ImportError) -> ValueError:
    """That a library is not installed which only some kinds of tokenizers need, and which is imported for these alone."""
    return ValueError(
        f"tokenizer: one of kind {kind!r} needs packages that are not installed ({error}); "
        "they come with the extra tokenizers: pip install 'onnxlate[tokenizers]'"
    )
