"""Text to token ids and back, also piece by piece.

Knows SentencePiece, Marian's vocabularies, and how to tell text that is certain from text that the next token may still change;
does not know limits, the end-of-sentence token of a model, or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from pydantic_core import from_json
from sentencepiece import sentencepiece_model_pb2

from serving.bundle import AnyTokenizerSpec, Bundle, MarianTokenizerSpec, TokenizerSpec
from serving.errors import BundleError

# What decoders put where bytes are no whole character, be it broken or not yet complete.
_REPLACEMENT = "\ufffd"
# What SentencePiece writes for a space.
_SPACE = "\u2581"
# Tokens of a Marian vocabulary that are no text.
_UNKNOWN, _END = "<unk>", "</s>"
_MARKERS = frozenset((_UNKNOWN, _END, "<s>", "<pad>"))


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


class ModelTokenizer(Tokenizer, Protocol):
    """A tokenizer that came in files and belongs to one model."""

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """Why it does not fit a model's vocabularies; empty when it does."""


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

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """See ``ModelTokenizer``.

        More pieces than embeddings make ids that the model does not know, fewer leave the model's tokens without text.
        """
        return [
            f"tokenizer: its {side} model has {pieces} pieces, the {side} vocabulary {size}"
            for side, pieces, size in (
                ("source", self.source_vocab_size, source_vocab_size),
                ("target", self.target_vocab_size, target_vocab_size),
            )
            if pieces != size
        ]


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
    ) -> None:
        """From loaded models and vocabularies, piece -> id, which have ``<unk>``; see ``load``."""
        self._source = source
        self._target = target
        self._largest_ids = {"source": max(source_vocabulary.values()), "target": max(target_vocabulary.values())}
        self._end_ids = {"source": source_vocabulary.get(_END), "target": target_vocabulary.get(_END)}
        self._unknown_id = source_vocabulary[_UNKNOWN]
        # Without markers: a model's pieces, or what it makes of characters it does not know, may spell one.
        self._ids = {piece: i for piece, i in source_vocabulary.items() if not _is_marker(piece)}
        # By the source model's own numbers; a list, since to make an array of a sentence's numbers takes longer than this does.
        pieces = map(source.id_to_piece, range(source.get_piece_size()))
        self._ids_by_number = [self._ids.get(piece, self._unknown_id) for piece in pieces]
        self._pieces = {i: piece for piece, i in target_vocabulary.items() if piece not in _MARKERS}

    @classmethod
    def load(cls, source_path: Path, target_path: Path, source_vocabulary: Path, target_vocabulary: Path) -> MarianTokenizer:
        """Load models and vocabularies; one path twice is loaded once.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no SentencePiece model, or one whose text cannot be told piece by piece, or no vocabulary; all
                such are named.
        """
        faults: list[str] = []
        loaded: dict[Path, Any] = {}
        for load, paths in ((_load, (source_path, target_path)), (_load_vocabulary, (source_vocabulary, target_vocabulary))):
            for path in dict.fromkeys(paths):
                try:
                    loaded[path] = load(path)
                except ValueError as error:
                    faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))
        return cls(loaded[source_path], loaded[target_path], loaded[source_vocabulary], loaded[target_vocabulary])

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """See ``ModelTokenizer``; a model may have more tokens than the vocabulary has pieces, and these have no text."""
        return [
            f"tokenizer: its {side} vocabulary has ids up to {self._largest_ids[side]}, the model's vocabulary is of {size}"
            for side, size in (("source", source_vocab_size), ("target", target_vocab_size))
            if self._largest_ids[side] >= size
        ]

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

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``. The unknown token has no text; a piece that the target model does not have is its own."""
        pieces = [piece for i in ids if (piece := self._pieces.get(i))]
        text: str = self._target.decode_pieces(pieces)
        # SentencePiece leaves its space symbol in pieces that it does not know. No other white space is stripped: before its last
        # byte came, one made of bytes was a replacement character, and the spaces in front of that were told.
        return text.replace(_SPACE, " ").strip(" ")


def open_tokenizer(spec: AnyTokenizerSpec, files: Mapping[str, Path]) -> ModelTokenizer:
    """The tokenizer that a spec describes; ``files`` has the path of each of its ``file_names``.

    Raises:
        OSError: a file cannot be read.
        ValueError: files are not what the spec says they are; names them.
    """
    match spec:
        case TokenizerSpec():
            return SentencePieceTokenizer.load(files[spec.source_model], files[spec.target_model])
        case MarianTokenizerSpec():
            return MarianTokenizer.load(
                files[spec.source_model], files[spec.target_model], files[spec.source_vocabulary], files[spec.target_vocabulary]
            )


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        BundleError: its files are no such tokenizer, or not this model's.
    """
    spec, sizes = bundle.manifest.tokenizer, bundle.manifest.architecture
    try:
        tokenizer = open_tokenizer(spec, {name: bundle.path(name) for name in spec.file_names})
    except (OSError, ValueError) as error:
        raise BundleError(bundle.directory, [str(error)]) from error
    if faults := tokenizer.vocabulary_faults(sizes.source_vocab_size, sizes.target_vocab_size):
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


def _load_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name}: is not JSON: {error}") from error
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise ValueError(f"{path.name}: is no vocabulary: an object of pieces and their ids, none below 0")
    if _UNKNOWN not in vocabulary:
        raise ValueError(f"{path.name}: has no {_UNKNOWN}")
    return vocabulary


def _is_marker(piece: str) -> bool:
    """Whether a vocabulary's token is none of text: a marker, or the name of a language (``>>deu<<``)."""
    return piece in _MARKERS or (piece.startswith(">>") and piece.endswith("<<") and len(piece) > len(">><<"))
