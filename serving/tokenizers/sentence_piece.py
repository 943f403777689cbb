"""SentencePiece models whose own numbers are the token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from serving.manifest import TokenizerSpec
from serving.tokenizers.base import TokenizerFiles, contents_of, forms_of, known_ids, without_incomplete_character

# What SentencePiece writes for a space.
SPACE = "\u2581"


class SentencePieceTokenizer:
    """A SentencePiece model for each side; may be one and the same. Any number of threads may use it."""

    def __init__(self, source: sentencepiece.SentencePieceProcessor, target: sentencepiece.SentencePieceProcessor) -> None:
        """From loaded models; see ``load``."""
        self._source = source
        self._target = target

    @classmethod
    def load(cls, spec: TokenizerSpec, files: TokenizerFiles) -> SentencePieceTokenizer:
        """Load both models; one file for both sides is loaded once.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no SentencePiece model, or one whose text cannot be told piece by piece.
        """
        models = {name: load_model(name, contents_of(files, name)) for name in spec.file_names}
        return cls(models[spec.source_model], models[spec.target_model])

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

    @property
    def unknown_target_id(self) -> int:
        """See ``Tokenizer``."""
        unknown_id: int = self._target.unk_id()
        return unknown_id

    def encode_target(self, text: str) -> list[int] | None:
        """See ``Tokenizer.encode_target``."""
        return known_ids(self._encode_target(text), self.unknown_target_id)

    def target_forms(self, text: str) -> list[list[int]]:
        """See ``Tokenizer.target_forms``."""
        return forms_of(self._encode_target, text, self.unknown_target_id)

    def _encode_target(self, text: str) -> list[int]:
        text.encode()  # as ``encode``
        return self._target.encode(text)  # type: ignore[no-any-return]  # likewise

    def target_id(self, token: str) -> int | None:
        """See ``Tokenizer.target_id``."""
        found: int = self._target.piece_to_id(token)
        is_text = not (self._target.is_control(found) or self._target.is_unknown(found))
        return found if is_text and self._target.id_to_piece(found) == token else None

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        return self._target.decode(list(ids))  # type: ignore[no-any-return]  # of a list[int] it is a str; the stub is a union

    def decode_with(self, ids: Sequence[int], instead: Mapping[int, str]) -> str:
        """See ``Tokenizer.decode_with``."""
        if not instead:
            return self.decode(ids)
        spelled = zip(range(len(ids)), ids, self.target_pieces(ids), strict=True)
        pieces = [instead.get(place, piece) for place, i, piece in spelled if place in instead or not self._target.is_control(i)]
        text: str = self._target.decode_pieces(pieces)
        # SentencePiece leaves its space symbol in pieces that it does not know.
        return text.replace(SPACE, " ").strip(" ")

    def source_pieces(self, text: str) -> list[str]:
        """See ``Tokenizer.source_pieces``."""
        text.encode()  # as ``encode``
        return self._source.encode(text, out_type=str)  # type: ignore[no-any-return]  # likewise

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """See ``Tokenizer.target_pieces``."""
        return [self._target.id_to_piece(i) for i in ids]

    def certain_text(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.certain_text``."""
        return without_incomplete_character(self.decode(ids))

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


def load_model(name: str, serialized: bytes) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model.

    Raises:
        ValueError: it is none, or one whose text cannot be told piece by piece; names the file.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(serialized)
    except RuntimeError as error:
        raise ValueError(f"{name}: is no SentencePiece model: {error}") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]  # made at import
    if model.denormalizer_spec.precompiled_charsmap:
        raise ValueError(f"{name}: rewrites text after decoding (denormalization rules); such models are not supported")
    return processor
