"""Pieces of all kinds of tokenizers: what a source is cut into, and targets with pieces of a source put in."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tokenizers import Tokenizer
from serving.tokenizers.tokens import TokensTokenizer
from tests.serving import test_tokenizers_hugging_face as hugging_face
from tests.serving import test_tokenizers_marian as marian
from tests.serving import test_tokenizers_sentence_piece as sentence_piece
from tests.serving import test_tokenizers_subword_nmt as subword_nmt
from tests.serving import test_tokenizers_tokens as tokens
from tests.support import tiny_sentencepiece
from tests.tokenizing import ANY_TEXT, ODD_TEXTS, german_sentencepiece, with_byte_pieces


def marian_tokenizer() -> Tokenizer:
    vocabulary = marian.joint_vocabulary()
    return marian.load_marian(tiny_sentencepiece(), german_sentencepiece(), vocabulary, vocabulary)


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "SentencePiece": lambda: sentence_piece.load(tiny_sentencepiece()),
    "SentencePiece with bytes": lambda: sentence_piece.load(with_byte_pieces()),
    "Marian": marian_tokenizer,
    "tokens": lambda: TokensTokenizer.load(tokens.SPEC, tokens.FILES),
    "byte-pair codes": subword_nmt.load,
    "byte-pair codes after Moses": lambda: subword_nmt.load(subword_nmt.moses()),
    "Hugging Face, bytes": lambda: hugging_face.load(hugging_face.byte_level()),
    "Hugging Face, unigram": lambda: hugging_face.load(hugging_face.unigram()),
    "Hugging Face, byte fallback": lambda: hugging_face.load(hugging_face.byte_fallback()),
    "Hugging Face, word pieces": lambda: hugging_face.load(hugging_face.word_piece()),
}


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return MAKERS[kind]()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("text", ["", "  ", *ODD_TEXTS], ids=ascii)
def test_odd_text_has_a_piece_for_each_id(kind: str, text: str) -> None:
    assert len(tokenizer(kind).source_pieces(text)) == len(tokenizer(kind).encode(text))


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=50)
@given(text=ANY_TEXT)
def test_any_text_has_a_piece_for_each_id(kind: str, text: str) -> None:
    assert len(tokenizer(kind).source_pieces(text)) == len(tokenizer(kind).encode(text))


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 49), max_size=12))
def test_nothing_put_in_is_the_text_itself(kind: str, ids: list[int]) -> None:
    assert tokenizer(kind).decode_with(ids, {}) == tokenizer(kind).decode(ids)
    assert len(tokenizer(kind).target_pieces(ids)) == len(ids)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_lone_surrogate_is_no_text(kind: str) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer(kind).source_pieces("a \ud800 man")


def test_pieces_of_sentencepiece() -> None:
    one = tokenizer("SentencePiece")
    pieces = one.source_pieces("a man \u2603")
    assert "".join(pieces).replace("\u2581", " ") == " a man \u2603"
    assert pieces[-1] == "\u2603"
    ids = one.encode("a man")
    assert one.target_pieces([*ids, 3]) == [*one.source_pieces("a man"), "</s>"]
    assert one.decode_with([*ids, 0], {len(ids): "\u2581snow"}) == "a man snow"
    # Whatever it is spelled like.
    assert one.decode_with([ids[0], 3, 0], {1: "\u2603", 2: "\u2581dog"}).split()[-1] == "dog"


def test_pieces_of_marian() -> None:
    one, vocabulary = tokenizer("Marian"), marian.joint_vocabulary()
    assert one.source_pieces("a man \u2603")[-1] == "\u2603"
    ein = one.encode_target("ein")
    assert ein is not None
    pieces = one.target_pieces([*ein, vocabulary["<unk>"], vocabulary["</s>"]])
    assert pieces[-2:] == ["<unk>", "</s>"]
    assert "".join(pieces[:-2]) == "\u2581ein"
    assert one.target_pieces([10**6]) == [""]
    assert one.decode([*ein, vocabulary["<unk>"]]) == "ein"
    assert one.decode_with([*ein, vocabulary["<unk>"], *ein], {len(ein): "\u2581snow"}) == "ein snow ein"


def test_pieces_of_tokens() -> None:
    one = tokenizer("tokens")
    assert one.source_pieces("a  nothing </s>") == ["a", "nothing", "</s>"]
    assert one.target_pieces([4, 3, 99]) == ["ein", "<unk>", ""]
    assert one.decode_with([4, 3, 5, 2], {1: "</s>"}) == "ein </s> Mann"


def test_pieces_of_byte_pair_codes() -> None:
    one = tokenizer("byte-pair codes")
    assert one.source_pieces("man runs") == ["man", "runs"]
    # What the vocabulary lacks, and what codes and vocabulary lack, is spelled as it would be.
    assert one.source_pieces("ma\u4e2d\u4e8c man") == ["ma@@", "\u4e2d@@", "\u4e8c", "man"]
    unknown = subword_nmt.UNKNOWN_ID
    ids = [subword_nmt.VOCABULARY["man"], unknown, unknown, subword_nmt.VOCABULARY["runs"]]
    assert one.decode_with(ids, {1: "\u4e2d@@", 2: "\u4e8c"}) == "man \u4e2d\u4e8c runs"


def test_pieces_of_hugging_faces() -> None:
    one = tokenizer("Hugging Face, unigram")
    pieces = one.source_pieces("a man \u2603")
    assert pieces[-1] == "\u2603"
    assert "<unk>" not in pieces
    ids = one.encode("a man")
    assert one.decode_with([*ids, 3], {len(ids): "\u2581snow"}) == "a man snow"
    words = tokenizer("Hugging Face, word pieces")
    assert words.source_pieces("a \u2603\u2603 man")[1] == "\u2603\u2603"
