"""What every tokenizer is, and what several of them read: files, and vocabularies in JSON.

Does not know any kind of tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pydantic_core import from_json

# What decoders put where bytes are no whole character, be it broken or not yet complete.
_REPLACEMENT = "\ufffd"

# A tokenizer's files by the names that its spec uses: where one is, or its contents.
TokenizerFiles = Mapping[str, Path | bytes]


class Tokenizer(Protocol):
    """Text to source ids, target ids to text. Any number of threads may use one."""

    def encode(self, text: str) -> list[int]:
        """Source ids, without the end-of-sentence token; empty for text in which nothing is left to translate.

        Tokens that are no text, such as the end-of-sentence token or a language, never come of text, however it is spelled.

        Raises:
            UnicodeEncodeError: ``text`` holds a lone surrogate. Text that came as UTF-8 holds none.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of target ids; tokens that are no text have none."""

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
