from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.manifest import Manifest, MarianTokenizerSpec
from serving.tokenizers import load_tokenizer
from serving.tokenizers.marian import MarianTokenizer
from tests.serving.test_bundle import manifest_fields
from tests.support import TINY_LINES, tiny_sentencepiece, train_sentencepiece
from tests.tokenizing import ANY_TEXT, german_sentencepiece, stream, with_byte_pieces
from tests.vocabularies import marian_vocabulary

LANGUAGE = ">>deu<<"


MARIAN_NAMES = ("source.spm", "target.spm", "vocab.json", "target_vocab.json")


def spec_of(special_tokens: Sequence[str] = ()) -> MarianTokenizerSpec:
    return MarianTokenizerSpec(
        kind="marian",
        source_model="source.spm",
        target_model="target.spm",
        source_vocabulary="vocab.json",
        target_vocabulary="target_vocab.json",
        special_tokens=list(special_tokens),
    )


def files_of(
    source: bytes, target: bytes, source_vocabulary: dict[str, int], target_vocabulary: dict[str, int]
) -> dict[str, bytes]:
    contents = source, target, json.dumps(source_vocabulary).encode(), json.dumps(target_vocabulary).encode()
    return dict(zip(MARIAN_NAMES, contents, strict=True))


def load_marian(
    source: bytes,
    target: bytes,
    source_vocabulary: dict[str, int],
    target_vocabulary: dict[str, int],
    special_tokens: Sequence[str] = (),
) -> MarianTokenizer:
    return MarianTokenizer.load(spec_of(special_tokens), files_of(source, target, source_vocabulary, target_vocabulary))


@functools.cache
def joint_vocabulary() -> dict[str, int]:
    """Pieces of both sides, of which some are of one side alone, a language, and a piece that neither model has."""
    sides = (marian_vocabulary(tiny_sentencepiece(), seed=1), marian_vocabulary(german_sentencepiece(), seed=2))
    pieces = dict.fromkeys([*sides[0], *sides[1], "▁Übel", "\U0001f600", "Ж", LANGUAGE])
    return {piece: i for i, piece in enumerate(pieces)}


@pytest.fixture(scope="module")
def marian() -> MarianTokenizer:
    vocabulary = joint_vocabulary()
    return load_marian(tiny_sentencepiece(), german_sentencepiece(), vocabulary, vocabulary)


def names_of(ids: Sequence[int], vocabulary: dict[str, int]) -> list[str]:
    pieces = {i: piece for piece, i in vocabulary.items()}
    return [pieces[i] for i in ids]


@pytest.mark.parametrize("line", TINY_LINES[::5])
def test_ids_are_those_of_the_pieces(marian: MarianTokenizer, line: str) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece())
    ids = marian.encode(line)
    assert names_of(ids, joint_vocabulary()) == model.encode(line, out_type=str)
    assert ids != model.encode(line)
    assert marian.decode(ids) == line


@pytest.mark.parametrize("text", ["", "   ", "\n\t"], ids=repr)
def test_blank_text_has_no_ids(marian: MarianTokenizer, text: str) -> None:
    assert marian.encode(text) == []


def test_characters_that_only_the_vocabulary_has(marian: MarianTokenizer) -> None:
    names = names_of(marian.encode("a \U0001f600 man Ж \u4e00"), joint_vocabulary())
    assert [name for name in names if name in ("\U0001f600", "Ж", "<unk>")] == ["\U0001f600", "Ж", "<unk>"]


@pytest.mark.parametrize("marker", ["</s>", "<pad>", "<s>", LANGUAGE])
@pytest.mark.parametrize("frame", ["{}", "{} a man", "a man {}", "a{}b", " {}", "{0}{0}"])
def test_markers_in_text_are_only_text(marian: MarianTokenizer, marker: str, frame: str) -> None:
    names = names_of(marian.encode(frame.format(marker)), joint_vocabulary())
    assert not {"</s>", "<pad>", "<s>", LANGUAGE} & set(names)
    assert names != []


def test_pieces_that_spell_a_marker_are_unknown() -> None:
    markers = ["</s>x", "<pad>", LANGUAGE]
    source = train_sentencepiece(user_defined_symbols=markers, vocab_size=72)
    vocabulary = {**marian_vocabulary(source), LANGUAGE: 5, "<pad>": 6}
    tokenizer = load_marian(source, source, vocabulary, vocabulary)
    names = names_of(tokenizer.encode(f"a {LANGUAGE} man <pad>"), {**vocabulary, "5": 5, "6": 6})
    assert names.count("<unk>") == 2
    assert not {"5", "6", LANGUAGE, "<pad>"} & set(names)


@pytest.mark.parametrize("marker", ["</s>", "<pad>", LANGUAGE])
def test_unknown_characters_that_spell_a_marker_are_unknown(marker: str) -> None:
    # None of the marker's characters is known, so that SentencePiece makes one piece of them all.
    source = train_sentencepiece(("\u4e00\u4e01 \u4e01\u4e00", "\u4e00"), vocab_size=8)
    vocabulary = {**marian_vocabulary(source), LANGUAGE: 20}
    tokenizer = load_marian(source, source, vocabulary, vocabulary)
    model = sentencepiece.SentencePieceProcessor(model_proto=source)
    assert marker in model.encode(marker, out_type=str)
    assert set(tokenizer.encode(marker)) == {vocabulary["▁"], vocabulary["<unk>"]}


def test_refuses_a_lone_surrogate(marian: MarianTokenizer) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        marian.encode("a \ud800 man")


def test_decodes_what_the_target_model_does_not_have(marian: MarianTokenizer) -> None:
    vocabulary = joint_vocabulary()
    ids = [vocabulary[piece] for piece in ("▁Übel", "▁", "\U0001f600", "▁Übel", "s")]
    assert marian.decode(ids) == "Übel \U0001f600 Übels"
    assert marian.decode([vocabulary[LANGUAGE]]) == LANGUAGE


def test_markers_and_ids_without_a_piece_have_no_text(marian: MarianTokenizer) -> None:
    vocabulary = joint_vocabulary()
    special = [vocabulary[name] for name in ("<pad>", "</s>", "<unk>")]
    ids = marian.encode("a man")
    assert marian.decode([*special, *ids, 10**6, *special]) == "a man"
    assert marian.decode(special) == ""
    assert marian.decode([]) == ""


def test_vocabularies_apart() -> None:
    sides = marian_vocabulary(tiny_sentencepiece(), seed=1), marian_vocabulary(german_sentencepiece(), seed=2)
    tokenizer = load_marian(tiny_sentencepiece(), german_sentencepiece(), *sides)
    model = sentencepiece.SentencePieceProcessor(model_proto=german_sentencepiece())
    assert names_of(tokenizer.encode("a man"), sides[0]) == tiny_pieces("a man")
    assert tokenizer.decode([sides[1][piece] for piece in model.encode("ein mann läuft", out_type=str)]) == "ein mann läuft"
    assert tokenizer.vocabulary_faults(len(sides[0]), len(sides[1])) == []
    assert tokenizer.vocabulary_faults(len(sides[0]) + 9, len(sides[1]) - 1) == [
        f"tokenizer: its target vocabulary has ids up to {len(sides[1]) - 1}, the model's vocabulary is of {len(sides[1]) - 1}"
    ]
    assert tokenizer.end_faults(0) == []


def tiny_pieces(text: str) -> list[str]:
    pieces: list[str] = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece()).encode(text, out_type=str)
    return pieces


def test_end_faults() -> None:
    vocabulary = marian_vocabulary(tiny_sentencepiece())
    endless = {piece: i for piece, i in vocabulary.items() if piece != "</s>"}
    tokenizer = load_marian(tiny_sentencepiece(), tiny_sentencepiece(), endless, vocabulary)
    assert tokenizer.end_faults(0) == [
        "tokenizer: </s> has id None in the source vocabulary, the model's end-of-sentence token is 0",
    ]


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        ("{", r"vocab\.json: is not JSON"),
        ("[]", r"vocab\.json: is no vocabulary"),
        ('{"<unk>": -1}', r"vocab\.json: is no vocabulary"),
        ('{"<unk>": "1"}', r"vocab\.json: is no vocabulary"),
        ('{"<unk>": true}', r"vocab\.json: is no vocabulary"),
        ('{"a": 1}', r"vocab\.json: has no <unk>"),
        ("{}", r"vocab\.json: is an empty vocabulary"),
    ],
)
def test_refuses_what_is_no_vocabulary(contents: str, fault: str) -> None:
    vocabulary = joint_vocabulary()
    files = files_of(tiny_sentencepiece(), german_sentencepiece(), vocabulary, vocabulary)
    with pytest.raises(ValueError, match=fault):
        MarianTokenizer.load(spec_of(), files | {"vocab.json": contents.encode()})


def test_names_all_broken_files() -> None:
    with pytest.raises(ValueError, match=r"source\.spm: .*; target\.spm: .*; vocab\.json: .*; target_vocab\.json: "):
        MarianTokenizer.load(spec_of(), dict.fromkeys(MARIAN_NAMES, b"none"))


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 120), max_size=24))
def test_what_is_told_adds_up(marian: MarianTokenizer, ids: list[int]) -> None:
    assert "".join(stream(marian, ids)) == marian.decode(ids)


@pytest.fixture(scope="module")
def byte_marian() -> MarianTokenizer:
    """With pieces that are bytes, and pieces that the target model does not have."""
    vocabulary = marian_vocabulary(with_byte_pieces())
    more = {piece: len(vocabulary) + i for i, piece in enumerate(("▁Übel", "▁▁", "\ufffd", "\u2003", " "))}
    joint = {**vocabulary, **more}
    return load_marian(with_byte_pieces(), with_byte_pieces(), joint, joint)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 330), max_size=24), text=st.text(max_size=12))
def test_what_is_told_adds_up_with_bytes(byte_marian: MarianTokenizer, ids: list[int], text: str) -> None:
    ids = [*ids, *byte_marian.encode(text), *ids[:3]]
    assert "".join(stream(byte_marian, ids)) == byte_marian.decode(ids)


def test_space_of_bytes_after_a_space(byte_marian: MarianTokenizer) -> None:
    vocabulary = marian_vocabulary(with_byte_pieces())
    ids = [vocabulary[piece] for piece in ("▁a", "▁", "<0xE2>", "<0x80>", "<0x83>")]  # an em space
    assert "".join(stream(byte_marian, ids)) == byte_marian.decode(ids) == "a \u2003"


SPECIAL = ("__de__", "deu_Latn", "<mask>")


def with_languages(*, user_defined: bool) -> tuple[bytes, dict[str, int]]:
    """A model and a vocabulary as of many languages; the model may even have the names of languages as pieces of its own."""
    options: dict[str, Any] = {"user_defined_symbols": list(SPECIAL), "vocab_size": 80} if user_defined else {}
    serialized = train_sentencepiece(**options)
    vocabulary = {piece: i for piece, i in marian_vocabulary(serialized).items() if piece not in SPECIAL}
    first_id = max(vocabulary.values()) + 1
    return serialized, vocabulary | {token: first_id + i for i, token in enumerate(SPECIAL)}


@pytest.mark.parametrize("user_defined", [False, True], ids=["of the vocabulary alone", "pieces of the model"])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("frame", ["{}", "{} a man", "a man {}", "a{}b", " {}", "{0}{0}"])
def test_special_tokens_in_text_are_only_text(user_defined: bool, special: str, frame: str) -> None:
    serialized, vocabulary = with_languages(user_defined=user_defined)
    tokenizer = load_marian(serialized, serialized, vocabulary, vocabulary, SPECIAL)
    ids = tokenizer.encode(frame.format(special))
    assert ids != []
    assert not {vocabulary[token] for token in SPECIAL} & set(ids)


@settings(deadline=None)
@given(text=ANY_TEXT, special=st.sampled_from(SPECIAL))
def test_no_text_makes_a_special_token(text: str, special: str) -> None:
    serialized, vocabulary = with_languages_as_pieces()
    tokenizer = load_marian(serialized, serialized, vocabulary, vocabulary, SPECIAL)
    forbidden = {vocabulary[token] for token in (*SPECIAL, "</s>", "<pad>")}
    assert not forbidden & set(tokenizer.encode(text + special + text))


@functools.cache
def with_languages_as_pieces() -> tuple[bytes, dict[str, int]]:
    return with_languages(user_defined=True)


def test_special_tokens_have_no_text() -> None:
    serialized, vocabulary = with_languages(user_defined=False)
    ids = [
        vocabulary["__de__"],
        *load_marian(serialized, serialized, vocabulary, vocabulary).encode("a man"),
        vocabulary["<mask>"],
    ]
    assert load_marian(serialized, serialized, vocabulary, vocabulary).decode(ids) == "__de__ a man<mask>"
    assert load_marian(serialized, serialized, vocabulary, vocabulary, SPECIAL).decode(ids) == "a man"


def test_a_piece_of_a_special_tokens_id_is_special() -> None:
    serialized, vocabulary = with_languages(user_defined=False)
    vocabulary["<mask>"] = vocabulary["▁a"]
    tokenizer = load_marian(serialized, serialized, vocabulary, vocabulary, SPECIAL)
    assert names_of(tokenizer.encode("a"), {"<unk>": vocabulary["<unk>"]}) == ["<unk>"]


def test_a_special_token_may_be_of_one_side() -> None:
    serialized, vocabulary = with_languages(user_defined=False)
    plain = {piece: i for piece, i in vocabulary.items() if piece not in SPECIAL}
    tokenizer = load_marian(serialized, serialized, plain, vocabulary, SPECIAL)
    assert tokenizer.decode([vocabulary["<mask>"], vocabulary["▁a"]]) == "a"


def test_refuses_a_special_token_that_no_vocabulary_has() -> None:
    vocabulary = joint_vocabulary()
    with pytest.raises(ValueError, match=r"special_tokens: '__xx__', '__yy__': in no vocabulary"):
        load_marian(tiny_sentencepiece(), german_sentencepiece(), vocabulary, vocabulary, ("__xx__", LANGUAGE, "__yy__"))


def test_load_tokenizer_of_a_marian_bundle(tmp_path: Path) -> None:
    vocabulary = marian_vocabulary(tiny_sentencepiece())
    for name, contents in files_of(tiny_sentencepiece(), tiny_sentencepiece(), vocabulary, vocabulary).items():
        (tmp_path / name).write_bytes(contents)
    fields = manifest_fields()
    fields["tokenizer"] = spec_of().model_dump()
    fields["architecture"] |= {"source_vocab_size": len(vocabulary), "target_vocab_size": len(vocabulary)}
    tokenizer = load_tokenizer(Bundle(tmp_path, Manifest.model_validate(fields)))
    assert tokenizer.decode(tokenizer.encode("two dogs play")) == "two dogs play"
    fields["architecture"] |= {"target_vocab_size": 9}
    with pytest.raises(BundleError, match="its target vocabulary has ids up to"):
        load_tokenizer(Bundle(tmp_path, Manifest.model_validate(fields)))
