"""Text of the target to its tokens, of every kind of tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.manifest import MarianTokenizerSpec, SubwordNmtTokenizerSpec, TokenizerSpec, TokensTokenizerSpec
from serving.tokenizers import Tokenizer, open_tokenizer
from tests.serving import test_tokenizers_hugging_face as hugging_face
from tests.serving import test_tokenizers_subword_nmt as subword_nmt
from tests.support import GERMAN_LINES, tiny_sentencepiece
from tests.tokenizing import ANY_TEXT, german_sentencepiece, with_byte_pieces
from tests.vocabularies import marian_vocabulary

SPECIAL = ["<s>", "<pad>", "</s>", "__de__", ">>deu<<"]
WORDS = {token: i for i, token in enumerate([*SPECIAL, "<unk>", "ein", "mann", "läuft", "."])}
SOURCE_WORDS = {"<unk>": 0, "a": 1, "man": 2}
# Pieces of each side's own model, and tokens that are no text.
TARGET_PIECES = {**marian_vocabulary(german_sentencepiece()), ">>deu<<": 60, "__de__": 61}


def tokens() -> Tokenizer:
    spec = TokensTokenizerSpec(
        kind="tokens", source_vocabulary="source", target_vocabulary="target", unknown_id=0, special_tokens=SPECIAL
    )
    return open_tokenizer(spec, {"source": json.dumps(SOURCE_WORDS).encode(), "target": json.dumps(WORDS).encode()})


def sentence_piece(target: bytes) -> Tokenizer:
    spec = TokenizerSpec(kind="sentencepiece", source_model="source", target_model="target")
    return open_tokenizer(spec, {"source": tiny_sentencepiece(), "target": target})


def marian() -> Tokenizer:
    spec = MarianTokenizerSpec(
        kind="marian",
        source_model="source.spm",
        target_model="target.spm",
        source_vocabulary="source.json",
        target_vocabulary="target.json",
        special_tokens=["__de__"],
    )
    vocabularies = {"source.json": marian_vocabulary(tiny_sentencepiece()), "target.json": TARGET_PIECES}
    files = {name: json.dumps(vocabulary).encode() for name, vocabulary in vocabularies.items()}
    return open_tokenizer(spec, {"source.spm": tiny_sentencepiece(), "target.spm": german_sentencepiece(), **files})


def byte_pairs(spec: SubwordNmtTokenizerSpec, target_codes: str | None = "codes") -> Tokenizer:
    return open_tokenizer(spec.model_copy(update={"target_codes": target_codes}), subword_nmt.files_of())


TOKENIZERS: dict[str, Tokenizer] = {
    "sentencepiece": sentence_piece(german_sentencepiece()),
    "sentencepiece of bytes": sentence_piece(with_byte_pieces()),
    "marian": marian(),
    "tokens": tokens(),
    "unigram": hugging_face.load(hugging_face.unigram()),
    "languages": hugging_face.load(hugging_face.with_languages(), *hugging_face.LANGUAGES),
    "bytes": hugging_face.load(hugging_face.byte_level()),
    "codes": byte_pairs(subword_nmt.spec_of()),
    "moses": byte_pairs(subword_nmt.spec_of(subword_nmt.moses("de"))),
}
# No text makes these.
SPECIAL_IDS: dict[str, set[int]] = {
    "sentencepiece": {0, 1, 2, 3},
    "sentencepiece of bytes": {0, 1, 2, 3},
    "marian": {TARGET_PIECES[token] for token in ("</s>", "<unk>", "<pad>", ">>deu<<", "__de__")},
    "tokens": {WORDS[token] for token in [*SPECIAL, "<unk>"]},
    "unigram": {0, 1, 2, 3},
    # <unk>, __de__ and deu_Latn.
    "languages": {0, 3, 4},
    "bytes": {0, 1, 2, 3},
    "codes": set(subword_nmt.ids_of(*subword_nmt.SPECIAL)),
    "moses": set(subword_nmt.ids_of(*subword_nmt.SPECIAL)),
}
KNOWN: dict[str, Sequence[str]] = {
    **dict.fromkeys(TOKENIZERS, GERMAN_LINES),
    "tokens": ("ein mann läuft .", "ein"),
    "languages": ("a man",),
    "codes": ("man runs", "a man"),
    "moses": ("man runs, man", "a man (man)."),
}
BLANK = ("", " ", "\n \t")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_targets_tokens_have_its_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    for line in KNOWN[kind]:
        ids = tokenizer.encode_target(line)
        assert ids
        assert tokenizer.decode(ids) == line


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_blank_text_has_no_tokens(kind: str) -> None:
    for text in BLANK:
        assert TOKENIZERS[kind].encode_target(text) == []
        assert TOKENIZERS[kind].target_forms(text) == []


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=ANY_TEXT | st.sampled_from([*SPECIAL, "<unk>", "deu_Latn", "</s>ein", ">>deu<< ein mann"]))
def test_no_text_makes_a_token_that_is_none(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    for ids in (tokenizer.encode_target(text), *tokenizer.target_forms(text)):
        if ids is not None:
            assert SPECIAL_IDS[kind].isdisjoint(ids)
            assert tokenizer.unknown_target_id not in ids
    for token in SPECIAL:
        assert tokenizer.target_id(token) not in SPECIAL_IDS[kind]


@pytest.mark.parametrize("kind", ["sentencepiece", "marian", "tokens", "unigram", "codes"])
def test_what_the_target_cannot_write_has_no_tokens(kind: str) -> None:
    assert TOKENIZERS[kind].encode_target("ein 漢") is None
    assert TOKENIZERS[kind].target_forms("漢") == []


@pytest.mark.parametrize("kind", ["sentencepiece of bytes", "bytes"])
def test_a_target_of_bytes_can_write_all_text(kind: str) -> None:
    ids = TOKENIZERS[kind].encode_target("ein 漢")
    assert ids is not None
    assert TOKENIZERS[kind].decode(ids) == "ein 漢"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_lone_surrogate_is_no_text(kind: str) -> None:
    for method in (TOKENIZERS[kind].encode_target, TOKENIZERS[kind].target_forms):
        with pytest.raises(UnicodeEncodeError):
            method("\ud800")


@pytest.mark.parametrize("kind", ["sentencepiece", "marian", "unigram"])
def test_a_word_has_other_tokens_inside_of_another(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    first, inside = tokenizer.target_forms("e")
    assert [tokenizer.decode([*first, *first]), tokenizer.decode([*first, *inside])] == ["e e", "ee"]


def test_of_bytes_the_word_after_a_space_is_another() -> None:
    tokenizer = TOKENIZERS["bytes"]
    inside, after_a_space = tokenizer.target_forms("mann")
    assert [tokenizer.decode(inside), tokenizer.decode(after_a_space)] == ["mann", " mann"]


@pytest.mark.parametrize("kind", ["tokens", "codes", "moses"])
def test_where_words_are_cut_apart_there_is_one_form(kind: str) -> None:
    word = {"tokens": "mann", "codes": "man", "moses": "man"}[kind]
    assert TOKENIZERS[kind].target_forms(word) == [TOKENIZERS[kind].encode_target(word)]


@pytest.mark.parametrize(
    ("kind", "token"),
    [
        ("sentencepiece", "▁ein"),
        ("marian", "▁ein"),
        ("tokens", "mann"),
        ("unigram", "▁a"),
        ("bytes", "Ġa"),
        ("codes", "ma@@"),
        ("moses", "&quot;"),
    ],
)
def test_tokens_are_found_as_the_target_spells_them(kind: str, token: str) -> None:
    assert TOKENIZERS[kind].target_id(token) is not None
    assert TOKENIZERS[kind].target_id(f"{token}{token}x") is None


def test_the_unknown_token_of_the_target_is_the_one_of_that_name() -> None:
    assert TOKENIZERS["tokens"].unknown_target_id == WORDS["<unk>"] != SOURCE_WORDS["<unk>"]
    assert TOKENIZERS["marian"].unknown_target_id == TARGET_PIECES["<unk>"]
    assert TOKENIZERS["bytes"].unknown_target_id is None
    assert TOKENIZERS["sentencepiece"].unknown_target_id == 1


def test_codes_of_the_source_alone_cut_no_target() -> None:
    tokenizer = byte_pairs(subword_nmt.spec_of(), None)
    for method in (tokenizer.encode_target, tokenizer.target_forms):
        with pytest.raises(ValueError, match="byte-pair codes of its source alone"):
            method("man")
    assert tokenizer.target_id("man") == subword_nmt.ids_of("man")[0]


def test_a_target_may_have_codes_of_its_own() -> None:
    spec = subword_nmt.spec_of().model_copy(update={"target_codes": "others"})
    assert spec.file_names == ["codes", "others", "source.json", "target.json"]
    files = {**subword_nmt.files_of(), "others": b"#version: 0.2\nr u\n"}
    tokenizer = open_tokenizer(spec, files)
    ids = tokenizer.encode_target("ru")
    assert ids is not None
    assert subword_nmt.names_of(ids) == ["r@@", "u"]
    assert tokenizer.encode("runs") == subword_nmt.ids_of("runs")
    with pytest.raises(ValueError, match="others: line 2 is no code"):
        open_tokenizer(spec, {**files, "others": b"#version: 0.2\nr\n"})
