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

from serving.bundle import Bundle, Manifest
from serving.errors import BundleError
from serving.tokenizer import MarianTokenizer, SentencePieceTokenizer, StreamingDetokenizer, Tokenizer, load_tokenizer
from tests.serving.test_bundle import manifest_fields
from tests.support import BOS_ID, EOS_ID, GERMAN_LINES, PAD_ID, TINY_LINES, UNKNOWN_ID, tiny_sentencepiece, train_sentencepiece
from tests.vocabularies import marian_vocabulary


@functools.cache
def with_byte_pieces() -> bytes:
    """Characters that training did not see become the pieces of their UTF-8 bytes."""
    return train_sentencepiece(vocab_size=320, byte_fallback=True)


def load(directory: Path, serialized: bytes) -> SentencePieceTokenizer:
    path = directory / "sentencepiece.model"
    path.write_bytes(serialized)
    return SentencePieceTokenizer.load(path, path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return load(tmp_path_factory.mktemp("tokenizer"), tiny_sentencepiece())


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return load(tmp_path_factory.mktemp("tokenizer"), with_byte_pieces())


@pytest.mark.parametrize("line", TINY_LINES[::7])
def test_text_survives_its_ids(tokenizer: SentencePieceTokenizer, line: str) -> None:
    ids = tokenizer.encode(line)
    assert EOS_ID not in ids
    assert tokenizer.decode(ids) == line


@pytest.mark.parametrize("text", ["", "   ", "\n\t"], ids=repr)
def test_blank_text_has_no_ids(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.encode(text) == []


@pytest.mark.parametrize(
    "text", ["a\0man", "a\x07man", "line\nline", "\u200b\ufeff", "\ufffd", "\U0001f600", "\U0010ffff", "a" * 5000], ids=ascii
)
@pytest.mark.parametrize("kind", ["tokenizer", "byte_tokenizer"])
def test_odd_text_is_encoded_within_the_vocabulary(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: SentencePieceTokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.source_vocab_size for i in ids)
    assert not {PAD_ID, BOS_ID, EOS_ID} & set(ids)


@pytest.mark.parametrize("marker", ["<s>", "</s>", "<pad>"])
def test_a_marker_spelled_out_is_only_text(tokenizer: SentencePieceTokenizer, marker: str) -> None:
    assert not {PAD_ID, BOS_ID, EOS_ID} & set(tokenizer.encode(f"a man {marker} runs"))


def test_a_lone_surrogate_is_no_text(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer.encode("a \ud800 man")


def test_markers_have_no_text(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("a man runs")
    assert tokenizer.decode([BOS_ID, *ids, EOS_ID, PAD_ID]) == "a man runs"


def test_each_side_has_its_own_model(tmp_path: Path) -> None:
    german = train_sentencepiece(GERMAN_LINES, vocab_size=50)
    (tmp_path / "source.model").write_bytes(tiny_sentencepiece())
    (tmp_path / "target.model").write_bytes(german)
    tokenizer = SentencePieceTokenizer.load(tmp_path / "source.model", tmp_path / "target.model")
    alone = load(tmp_path, german)
    assert (tokenizer.source_vocab_size, tokenizer.target_vocab_size) == (64, 50)
    assert tokenizer.encode("a man") == load(tmp_path, tiny_sentencepiece()).encode("a man")
    assert tokenizer.decode(alone.encode("ein mann läuft")) == "ein mann läuft"


def test_load_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sentencepiece\.model: is no SentencePiece model"):
        load(tmp_path, b"no model")


def test_load_refuses_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sentencepiece\.model: is no SentencePiece model"):
        load(tmp_path, b"")


def test_load_refuses_text_that_is_rewritten_after_decoding(tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("64\t41\n", encoding="utf-8")  # d becomes A
    serialized = train_sentencepiece(denormalization_rule_tsv=str(rules))
    with pytest.raises(ValueError, match="denormalization rules"):
        load(tmp_path, serialized)


def test_vocabulary_faults(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocabulary_faults(64, 64) == []
    assert tokenizer.vocabulary_faults(63, 72) == [
        "tokenizer: its source model has 64 pieces, the source vocabulary 63",
        "tokenizer: its target model has 64 pieces, the target vocabulary 72",
    ]


def bundle_with(directory: Path, serialized: bytes) -> Bundle:
    (directory / "sentencepiece.model").write_bytes(serialized)
    return Bundle(directory, Manifest.model_validate(manifest_fields()))


def test_load_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bundle_with(tmp_path, tiny_sentencepiece()))
    assert tokenizer.decode(tokenizer.encode("two dogs play")) == "two dogs play"


def test_load_tokenizer_names_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"sentencepiece\.model: is no SentencePiece model"):
        load_tokenizer(bundle_with(tmp_path, b"no model"))


def test_load_tokenizer_refuses_another_models_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has 320 pieces, the source vocabulary 64"):
        load_tokenizer(bundle_with(tmp_path, with_byte_pieces()))


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What is told after each token, and at the end."""
    detokenizer = StreamingDetokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def test_words_are_told_as_they_come(tokenizer: SentencePieceTokenizer) -> None:
    ids = [i for word in ("ein", "mann") for i in tokenizer.encode(word)]
    deltas = stream(tokenizer, ids)
    assert "".join(deltas) == "ein mann"
    assert deltas[0] != ""
    assert deltas[-1] == ""


def test_a_character_is_told_when_its_last_byte_is_there(byte_tokenizer: SentencePieceTokenizer) -> None:
    ids = byte_tokenizer.encode("a €")
    assert stream(byte_tokenizer, ids)[-5:] == [" ", "", "", "€", ""]


def test_a_character_that_stays_incomplete_is_told_at_the_end(byte_tokenizer: SentencePieceTokenizer) -> None:
    ids = byte_tokenizer.encode("a €")[:-1]
    assert stream(byte_tokenizer, ids)[-3:] == ["", "", "\ufffd\ufffd"]


def test_an_incomplete_character_is_told_when_text_follows(byte_tokenizer: SentencePieceTokenizer) -> None:
    broken, word = byte_tokenizer.encode("a €")[:-1], byte_tokenizer.encode("man")
    deltas = stream(byte_tokenizer, [*broken, *word])
    assert deltas[len(broken)].startswith("\ufffd\ufffd")
    assert deltas[-1] == ""


def test_nothing_is_told_of_no_tokens(tokenizer: SentencePieceTokenizer) -> None:
    assert StreamingDetokenizer(tokenizer).finish() == ""


@settings(deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 63), st.sampled_from([PAD_ID, UNKNOWN_ID, BOS_ID, EOS_ID])), max_size=24))
def test_what_is_told_adds_up(tokenizer: SentencePieceTokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 319), max_size=24), text=st.text(max_size=12))
def test_what_is_told_adds_up_with_bytes(byte_tokenizer: SentencePieceTokenizer, ids: list[int], text: str) -> None:
    ids = [*ids, *byte_tokenizer.encode(text)]
    assert "".join(stream(byte_tokenizer, ids)) == byte_tokenizer.decode(ids)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"add_dummy_prefix": False}, id="no dummy prefix"),
        pytest.param({"remove_extra_whitespaces": False}, id="white space kept"),
        pytest.param({"treat_whitespace_as_suffix": True}, id="white space as suffix"),
        pytest.param({"model_type": "bpe"}, id="bpe"),
    ],
)
def test_what_is_told_adds_up_for_other_models(tmp_path: Path, options: dict[str, Any]) -> None:
    tokenizer = load(tmp_path, train_sentencepiece(**options))
    spaces = tokenizer.encode("a  b ") + tokenizer.encode(" ")
    for i in range(tokenizer.target_vocab_size):
        for j in (*range(4), *spaces):
            ids = [i, j, i, UNKNOWN_ID, j]
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


LANGUAGE = ">>deu<<"


def load_marian(
    directory: Path, source: bytes, target: bytes, source_vocabulary: dict[str, int], target_vocabulary: dict[str, int]
) -> MarianTokenizer:
    (directory / "source.spm").write_bytes(source)
    (directory / "target.spm").write_bytes(target)
    (directory / "vocab.json").write_text(json.dumps(source_vocabulary))
    (directory / "target_vocab.json").write_text(json.dumps(target_vocabulary))
    return MarianTokenizer.load(*(directory / name for name in MARIAN_NAMES))


MARIAN_NAMES = ("source.spm", "target.spm", "vocab.json", "target_vocab.json")


@functools.cache
def german() -> bytes:
    return train_sentencepiece(GERMAN_LINES, vocab_size=50)


@functools.cache
def joint_vocabulary() -> dict[str, int]:
    """Pieces of both sides, of which some are of one side alone, a language, and a piece that neither model has."""
    sides = (marian_vocabulary(tiny_sentencepiece(), seed=1), marian_vocabulary(german(), seed=2))
    pieces = dict.fromkeys([*sides[0], *sides[1], "▁Übel", "\U0001f600", "Ж", LANGUAGE])
    return {piece: i for i, piece in enumerate(pieces)}


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> MarianTokenizer:
    vocabulary = joint_vocabulary()
    return load_marian(tmp_path_factory.mktemp("marian"), tiny_sentencepiece(), german(), vocabulary, vocabulary)


def names_of(ids: Sequence[int], vocabulary: dict[str, int]) -> list[str]:
    pieces = {i: piece for piece, i in vocabulary.items()}
    return [pieces[i] for i in ids]


@pytest.mark.parametrize("line", TINY_LINES[::5])
def test_marian_ids_are_those_of_the_pieces(marian: MarianTokenizer, tokenizer: SentencePieceTokenizer, line: str) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece())
    ids = marian.encode(line)
    assert names_of(ids, joint_vocabulary()) == model.encode(line, out_type=str)
    assert ids != tokenizer.encode(line)
    assert marian.decode(ids) == line


@pytest.mark.parametrize("text", ["", "   ", "\n\t"], ids=repr)
def test_marian_blank_text_has_no_ids(marian: MarianTokenizer, text: str) -> None:
    assert marian.encode(text) == []


def test_marian_characters_that_only_the_vocabulary_has(marian: MarianTokenizer) -> None:
    names = names_of(marian.encode("a \U0001f600 man Ж \u4e00"), joint_vocabulary())
    assert [name for name in names if name in ("\U0001f600", "Ж", "<unk>")] == ["\U0001f600", "Ж", "<unk>"]


@pytest.mark.parametrize("marker", ["</s>", "<pad>", "<s>", LANGUAGE])
@pytest.mark.parametrize("frame", ["{}", "{} a man", "a man {}", "a{}b", " {}", "{0}{0}"])
def test_marian_markers_in_text_are_only_text(marian: MarianTokenizer, marker: str, frame: str) -> None:
    names = names_of(marian.encode(frame.format(marker)), joint_vocabulary())
    assert not {"</s>", "<pad>", "<s>", LANGUAGE} & set(names)
    assert names != []


def test_marian_pieces_that_spell_a_marker_are_unknown(tmp_path: Path) -> None:
    markers = ["</s>x", "<pad>", LANGUAGE]
    source = train_sentencepiece(user_defined_symbols=markers, vocab_size=72)
    vocabulary = {**marian_vocabulary(source), LANGUAGE: 5, "<pad>": 6}
    tokenizer = load_marian(tmp_path, source, source, vocabulary, vocabulary)
    names = names_of(tokenizer.encode(f"a {LANGUAGE} man <pad>"), {**vocabulary, "5": 5, "6": 6})
    assert names.count("<unk>") == 2
    assert not {"5", "6", LANGUAGE, "<pad>"} & set(names)


@pytest.mark.parametrize("marker", ["</s>", "<pad>", LANGUAGE])
def test_marian_unknown_characters_that_spell_a_marker_are_unknown(tmp_path: Path, marker: str) -> None:
    # None of the marker's characters is known, so that SentencePiece makes one piece of them all.
    source = train_sentencepiece(("\u4e00\u4e01 \u4e01\u4e00", "\u4e00"), vocab_size=8)
    vocabulary = {**marian_vocabulary(source), LANGUAGE: 20}
    tokenizer = load_marian(tmp_path, source, source, vocabulary, vocabulary)
    model = sentencepiece.SentencePieceProcessor(model_proto=source)
    assert marker in model.encode(marker, out_type=str)
    assert set(tokenizer.encode(marker)) == {vocabulary["▁"], vocabulary["<unk>"]}


def test_marian_refuses_a_lone_surrogate(marian: MarianTokenizer) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        marian.encode("a \ud800 man")


def test_marian_decodes_what_the_target_model_does_not_have(marian: MarianTokenizer) -> None:
    vocabulary = joint_vocabulary()
    ids = [vocabulary[piece] for piece in ("▁Übel", "▁", "\U0001f600", "▁Übel", "s")]
    assert marian.decode(ids) == "Übel \U0001f600 Übels"
    assert marian.decode([vocabulary[LANGUAGE]]) == LANGUAGE


def test_marian_markers_and_ids_without_a_piece_have_no_text(marian: MarianTokenizer) -> None:
    vocabulary = joint_vocabulary()
    special = [vocabulary[name] for name in ("<pad>", "</s>", "<unk>")]
    ids = marian.encode("a man")
    assert marian.decode([*special, *ids, 10**6, *special]) == "a man"
    assert marian.decode(special) == ""
    assert marian.decode([]) == ""


def test_marian_vocabularies_apart(tmp_path: Path) -> None:
    sides = marian_vocabulary(tiny_sentencepiece(), seed=1), marian_vocabulary(german(), seed=2)
    tokenizer = load_marian(tmp_path, tiny_sentencepiece(), german(), *sides)
    model = sentencepiece.SentencePieceProcessor(model_proto=german())
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


def test_marian_end_faults(tmp_path: Path) -> None:
    vocabulary = marian_vocabulary(tiny_sentencepiece())
    endless = {piece: i for piece, i in vocabulary.items() if piece != "</s>"}
    tokenizer = load_marian(tmp_path, tiny_sentencepiece(), tiny_sentencepiece(), endless, vocabulary)
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
        ("{}", r"vocab\.json: has no <unk>"),
    ],
)
def test_marian_refuses_what_is_no_vocabulary(tmp_path: Path, marian: MarianTokenizer, contents: str, fault: str) -> None:
    vocabulary = joint_vocabulary()
    load_marian(tmp_path, tiny_sentencepiece(), german(), vocabulary, vocabulary)
    (tmp_path / "vocab.json").write_text(contents)
    with pytest.raises(ValueError, match=fault):
        MarianTokenizer.load(*(tmp_path / name for name in MARIAN_NAMES))


def test_marian_names_all_broken_files(tmp_path: Path) -> None:
    for name in MARIAN_NAMES:
        (tmp_path / name).write_bytes(b"none")
    with pytest.raises(ValueError, match=r"source\.spm: .*; target\.spm: .*; vocab\.json: .*; target_vocab\.json: "):
        MarianTokenizer.load(*(tmp_path / name for name in MARIAN_NAMES))


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 120), max_size=24))
def test_marian_what_is_told_adds_up(marian: MarianTokenizer, ids: list[int]) -> None:
    assert "".join(stream(marian, ids)) == marian.decode(ids)


@pytest.fixture(scope="module")
def byte_marian(tmp_path_factory: pytest.TempPathFactory) -> MarianTokenizer:
    """With pieces that are bytes, and pieces that the target model does not have."""
    vocabulary = marian_vocabulary(with_byte_pieces())
    more = {piece: len(vocabulary) + i for i, piece in enumerate(("▁Übel", "▁▁", "\ufffd", "\u2003", " "))}
    joint = {**vocabulary, **more}
    return load_marian(tmp_path_factory.mktemp("marian"), with_byte_pieces(), with_byte_pieces(), joint, joint)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 330), max_size=24), text=st.text(max_size=12))
def test_marian_what_is_told_adds_up_with_bytes(byte_marian: MarianTokenizer, ids: list[int], text: str) -> None:
    ids = [*ids, *byte_marian.encode(text), *ids[:3]]
    assert "".join(stream(byte_marian, ids)) == byte_marian.decode(ids)


def test_marian_space_of_bytes_after_a_space(byte_marian: MarianTokenizer) -> None:
    vocabulary = marian_vocabulary(with_byte_pieces())
    ids = [vocabulary[piece] for piece in ("▁a", "▁", "<0xE2>", "<0x80>", "<0x83>")]  # an em space
    assert "".join(stream(byte_marian, ids)) == byte_marian.decode(ids) == "a \u2003"


def test_load_tokenizer_of_a_marian_bundle(tmp_path: Path) -> None:
    vocabulary = marian_vocabulary(tiny_sentencepiece())
    load_marian(tmp_path, tiny_sentencepiece(), tiny_sentencepiece(), vocabulary, vocabulary)
    fields = manifest_fields()
    keys = ("source_model", "target_model", "source_vocabulary", "target_vocabulary")
    fields["tokenizer"] = {"kind": "marian", **dict(zip(keys, MARIAN_NAMES, strict=True))}
    fields["architecture"] |= {"source_vocab_size": len(vocabulary), "target_vocab_size": len(vocabulary)}
    tokenizer = load_tokenizer(Bundle(tmp_path, Manifest.model_validate(fields)))
    assert tokenizer.decode(tokenizer.encode("two dogs play")) == "two dogs play"
    fields["architecture"] |= {"target_vocab_size": 9}
    with pytest.raises(BundleError, match="its target vocabulary has ids up to"):
        load_tokenizer(Bundle(tmp_path, Manifest.model_validate(fields)))
