"""Byte-pair encoding of words as subword-nmt and fastBPE have it, after Moses' scripts or of text that comes as words.

The tokenizers library does the work: its byte-pair encoding of a word is theirs. Knows their files; does not know Moses' rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from serving.manifest import SubwordNmtTokenizerSpec
from serving.tokenizers.base import (
    TokenizerFiles,
    check_special_tokens,
    contents_of,
    forms_of,
    known_ids,
    missing_package,
    read_vocabulary,
    same_token,
    vocabulary_faults,
    without_tokens,
)
from serving.tokenizers.moses import Moses

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder

# Ends a piece that the next one continues, in vocabularies; ends the last piece of a word, in codes.
_CONTINUED, _WORD_END = "@@", "</w>"
_VERSION = "#version:"
_SUPPORTED_VERSION = "0.2"
# What the encoder makes of a character that neither the codes nor the vocabulary have; no symbol has a space.
_UNKNOWN_SYMBOL = " unknown"


class SubwordNmtTokenizer:
    """Codes and a vocabulary for each side; codes of the target may be missing. Any number of threads may use it."""

    def __init__(
        self,
        merges: Sequence[tuple[str, str]],
        target_merges: Sequence[tuple[str, str]] | None,
        source_vocabulary: Mapping[str, int],
        target_vocabulary: Mapping[str, int],
        unknown_id: int,
        special_tokens: Sequence[str] = (),
        moses: Moses | None = None,
    ) -> None:
        """From codes (of the target, None where there are none) and vocabularies, piece -> id; see ``load``.

        Raises:
            ImportError: tokenizers is not installed.
        """
        self._largest_ids = max(unknown_id, *source_vocabulary.values()), max(target_vocabulary.values())
        self._moses = moses
        self._source = _Pieces(merges, without_tokens(source_vocabulary, special_tokens), unknown_id)
        self._target_ids = without_tokens(target_vocabulary, special_tokens)
        self._unknown_target_id = same_token(unknown_id, source_vocabulary, target_vocabulary)
        # Of no token: what no target can have.
        self._no_id = max(target_vocabulary.values()) + 1
        self._target = None if target_merges is None else _Pieces(target_merges, self._target_ids, self._no_id)
        self._pieces = {i: piece for piece, i in self._target_ids.items()}
        self._spelled = {i: piece for piece, i in target_vocabulary.items()}

    @classmethod
    def load(cls, spec: SubwordNmtTokenizerSpec, files: TokenizerFiles) -> SubwordNmtTokenizer:
        """Load codes and vocabularies.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not what it should be, a special token is in no vocabulary, or a library is not installed.
        """
        merges = _read_codes(spec.source_codes, contents_of(files, spec.source_codes))
        target_merges = merges if spec.target_codes == spec.source_codes else None
        if target_merges is None and spec.target_codes is not None:
            target_merges = _read_codes(spec.target_codes, contents_of(files, spec.target_codes))
        source, target = (
            read_vocabulary(name, contents_of(files, name)) for name in (spec.source_vocabulary, spec.target_vocabulary)
        )
        check_special_tokens(spec.special_tokens, source, target)
        try:
            moses = Moses(spec.moses) if spec.moses else None
            return cls(merges, target_merges, source, target, spec.unknown_id, spec.special_tokens, moses)
        except ImportError as error:
            raise missing_package(spec.kind, error) from error

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """See ``ModelTokenizer``."""
        return vocabulary_faults(*self._largest_ids, source_vocab_size, target_vocab_size)

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``. A piece that the source vocabulary lacks, or that is no text, becomes the unknown one."""
        text.encode()  # a lone surrogate is refused here, where it is known as such
        words = self._moses.split(text) if self._moses else text.split()
        return self._source.ids(words)

    @property
    def unknown_target_id(self) -> int | None:
        """See ``Tokenizer``."""
        return self._unknown_target_id

    def encode_target(self, text: str) -> list[int] | None:
        """See ``Tokenizer.encode_target``."""
        return known_ids(self._encode_target(text), self._no_id)

    def target_forms(self, text: str) -> list[list[int]]:
        """See ``Tokenizer.target_forms``."""
        return forms_of(self._encode_target, text, self._no_id)

    def _encode_target(self, text: str) -> list[int]:
        text.encode()  # as ``encode``
        if self._target is None:
            raise ValueError("the model came with byte-pair codes of its source alone, so that no target text can be cut")
        return self._target.ids(self._moses.split_target(text) if self._moses else text.split())

    def target_id(self, token: str) -> int | None:
        """See ``Tokenizer.target_id``."""
        return self._target_ids.get(token)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        return self.decode_with(ids, {})

    def decode_with(self, ids: Sequence[int], instead: Mapping[int, str]) -> str:
        """See ``Tokenizer.decode_with``."""
        whole, last = self._words(ids, instead)
        return self._text([*whole, *last.split()])

    def source_pieces(self, text: str) -> list[str]:
        """See ``Tokenizer.source_pieces``."""
        text.encode()  # as ``encode``
        return self._source.spelled(self._moses.split(text) if self._moses else text.split())

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """See ``Tokenizer.target_pieces``."""
        return [self._spelled.get(i, "") for i in ids]

    def certain_text(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.certain_text``. After Moses' rules whole words only, and the last of them is not certain."""
        if self._moses is None:
            return self.decode(ids)
        whole, _ = self._words(ids, {})
        return self._text(self._moses.certain_words(whole))

    def _words(self, ids: Sequence[int], instead: Mapping[int, str]) -> tuple[list[str], str]:
        """Whole words, and the beginning of one whose other pieces have not come."""
        words: list[str] = []
        word = ""
        for place, i in enumerate(ids):
            piece = instead.get(place) or self._pieces.get(i)
            if piece is None:
                continue
            if piece.endswith(_CONTINUED):
                word += piece.removesuffix(_CONTINUED)
            else:
                words += (word + piece).split()
                word = ""
        return words, word

    def _text(self, words: Sequence[str]) -> str:
        return self._moses.join(words) if self._moses else " ".join(words)


class _Pieces:
    """Words to ids of one side."""

    def __init__(self, merges: Sequence[tuple[str, str]], ids: Mapping[str, int], unknown_id: int) -> None:
        symbols = _symbols(merges, ids)
        self._encoder = _encoder(merges, symbols)
        self._ids = [ids.get(_piece(symbol), unknown_id) for symbol in symbols]

    def ids(self, words: Sequence[str]) -> list[int]:
        """Of all pieces of these words; a piece that has none is unknown."""
        return [self._ids[symbol] for symbol in self._encoder.encode(words, is_pretokenized=True).ids]

    def spelled(self, words: Sequence[str]) -> list[str]:
        """The same pieces as the vocabulary spells them, or would."""
        encoding = self._encoder.encode(words, is_pretokenized=True)
        pieces = []
        for symbol, word, (start, stop) in zip(encoding.tokens, encoding.word_ids, encoding.offsets, strict=True):
            if symbol != _UNKNOWN_SYMBOL:
                pieces.append(_piece(symbol))
                continue
            assert word is not None, "words are all there is"
            pieces.append(words[word][start:stop] + (_CONTINUED if stop < len(words[word]) else ""))
        return pieces


def _read_codes(name: str, contents: bytes) -> list[tuple[str, str]]:
    """Pairs of symbols, the first to be merged first.

    subword-nmt's files have a line that tells their version, and two symbols a line. Those of fastBPE have no such line, and the
    number of occurrences after the symbols.
    """
    try:
        lines = contents.decode().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is not UTF-8: {error}") from error
    width = 3
    first = 0
    if lines[0].startswith(_VERSION):
        version = lines[0].removeprefix(_VERSION).strip()
        if version != _SUPPORTED_VERSION:
            raise ValueError(f"{name}: codes of version {version!r} are not supported, only {_SUPPORTED_VERSION}")
        width = 2
        first = 1
    elif len(lines[0].split(" ")) == 2:
        raise ValueError(f"{name}: codes without a line {_VERSION!r} are of version 0.1, which is not supported")
    merges: dict[tuple[str, str], None] = {}
    for number, line in enumerate(lines[first:], first + 1):
        symbols = line.strip("\r ").split(" ")
        if len(symbols) != width or not all(symbols):
            raise ValueError(f"{name}: line {number} is no code: {line[:40]!r}")
        # Of a pair that occurs twice the first counts.
        merges[symbols[0], symbols[1]] = None
    return list(merges)


def _symbols(merges: Sequence[tuple[str, str]], pieces: Mapping[str, int]) -> list[str]:
    """All that the encoder may make of a word; the first is what it makes of unknown characters.

    Characters of the vocabulary need not be in the codes.
    """
    characters = [symbol for piece in pieces if len((symbol := _symbol(piece)).removesuffix(_WORD_END)) == 1]
    merged = [symbol for left, right in merges for symbol in (left, right, left + right)]
    return list(dict.fromkeys((_UNKNOWN_SYMBOL, *characters, *merged)))


def _encoder(merges: Sequence[tuple[str, str]], symbols: Sequence[str]) -> Encoder:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    return Tokenizer(BPE(numbers, list(merges), unk_token=_UNKNOWN_SYMBOL, end_of_word_suffix=_WORD_END))


def _symbol(piece: str) -> str:
    """How codes spell a piece of a vocabulary."""
    return piece.removesuffix(_CONTINUED) if piece.endswith(_CONTINUED) else piece + _WORD_END


def _piece(symbol: str) -> str:
    """How vocabularies spell a symbol of the codes."""
    return symbol.removesuffix(_WORD_END) if symbol.endswith(_WORD_END) else symbol + _CONTINUED
