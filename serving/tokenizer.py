"""Text to token ids and back, also piece by piece.

Knows SentencePiece and how to tell text that is certain from text that the next token may still change; does not know limits,
the end-of-sentence token, models or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from serving.bundle import Bundle
from serving.errors import BundleError

# What decoders put where bytes are no whole character, be it broken or not yet complete.
_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """Text to source ids, target ids to text."""

    def encode(self, text: str) -> list[int]:
        """Source ids, without the end-of-sentence token; empty for text in which nothing is left to translate.

        Raises:
            UnicodeEncodeError: ``text`` holds a lone surrogate. Text that came as UTF-8 holds none.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of target ids; markers such as the end-of-sentence token have none.

        A longer list only appends: the text of the first ids, without its trailing replacement characters (bytes of a character
        that is not complete), is how the text of all of them starts.
        """


class SentencePieceTokenizer:
    """A SentencePiece model for each side; may be one and the same. Any number of threads may use it."""

    def __init__(self, source: sentencepiece.SentencePieceProcessor, target: sentencepiece.SentencePieceProcessor) -> None:
        """From loaded models; see ``load``."""
        self._source = source
        self._target = target

    @classmethod
    def load(cls, source_path: Path, target_path: Path) -> SentencePieceTokenizer:
        """Load both models; one path twice is loaded once.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no SentencePiece model, or one whose text cannot be told piece by piece.
        """
        source = _load(source_path)
        return cls(source, source if target_path == source_path else _load(target_path))

    @property
    def source_vocab_size(self) -> int:
        """Pieces of the source model."""
        return self._source.get_piece_size()

    @property
    def target_vocab_size(self) -> int:
        """Pieces of the target model."""
        return self._target.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``. Markers spelled out in the text (``</s>``) are text, never markers."""
        text.encode()  # SentencePiece's own complaint about a lone surrogate names neither the place nor the cause
        return self._source.encode(text)  # type: ignore[no-any-return]  # of a str it is a list[int]; the stub is a union

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        return self._target.decode(list(ids))  # type: ignore[no-any-return]  # of a list[int] it is a str; the stub is a union


def vocabulary_faults(tokenizer: SentencePieceTokenizer, source_vocab_size: int, target_vocab_size: int) -> list[str]:
    """Why a tokenizer does not fit a model's vocabularies; empty when it does.

    More pieces than embeddings make ids that the model does not know, fewer leave the model's tokens without text.
    """
    return [
        f"tokenizer: its {side} model has {pieces} pieces, the {side} vocabulary {size}"
        for side, pieces, size in (
            ("source", tokenizer.source_vocab_size, source_vocab_size),
            ("target", tokenizer.target_vocab_size, target_vocab_size),
        )
        if pieces != size
    ]


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        BundleError: its files are no such tokenizer, or not this model's.
    """
    spec, sizes = bundle.manifest.tokenizer, bundle.manifest.architecture
    try:
        tokenizer = SentencePieceTokenizer.load(bundle.path(spec.source_model), bundle.path(spec.target_model))
    except (OSError, ValueError) as error:
        raise BundleError(bundle.directory, [str(error)]) from error
    if faults := vocabulary_faults(tokenizer, sizes.source_vocab_size, sizes.target_vocab_size):
        raise BundleError(bundle.directory, faults)
    return tokenizer


class StreamingDetokenizer:
    """Text of one target as its tokens arrive; what it has told is never taken back.

    By the contract of ``Tokenizer.decode`` only trailing replacement characters can still change: they are the bytes of a
    character whose others have not come. Everything before them is told at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """For one target; make another for the next."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # characters

    def push(self, token_id: int) -> str:
        """Add a token; the text that is certain now and was not before, perhaps none."""
        self._ids.append(token_id)
        # All ids each time: 512 of them take some 20 us, and where pieces may be cut is the tokenizer's secret.
        return self._tell(self._tokenizer.decode(self._ids).rstrip(_REPLACEMENT))

    def finish(self) -> str:
        """The rest, when no token follows. All that was told is now exactly ``decode`` of all ids."""
        return self._tell(self._tokenizer.decode(self._ids))

    def _tell(self, text: str) -> str:
        delta = text[self._told :]
        self._told += len(delta)
        return delta


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    serialized = path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(serialized)
    except RuntimeError as error:
        raise ValueError(f"{path.name}: is no SentencePiece model: {error}") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]  # made at import
    if model.denormalizer_spec.precompiled_charsmap:
        raise ValueError(f"{path.name}: rewrites text after decoding (denormalization rules); such models are not supported")
    return processor
