"""Marian vocabularies for tests: pieces of a SentencePiece model under other ids than its own."""

from __future__ import annotations

import random

import sentencepiece


def marian_vocabulary(serialized: bytes, *, seed: int = 0) -> dict[str, int]:
    """``</s>``, ``<unk>``, the model's pieces in random order, ``<pad>``: as OPUS-MT numbers them."""
    model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size()) if not model.is_control(i) and not model.is_unknown(i)]
    random.Random(seed).shuffle(pieces)
    return {piece: i for i, piece in enumerate(["</s>", "<unk>", *pieces, "<pad>"])}
