from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.manifest import Manifest, TokenizerSpec
from serving.tokenizers import StreamingDetokenizer, load_tokenizer
from serving.tokenizers.sentence_piece import SentencePieceTokenizer
from tests.serving.test_bundle import manifest_fields
from tests.support import BOS_ID, EOS_ID, PAD_ID, TINY_LINES, UNKNOWN_ID, tiny_sentencepiece, train_sentencepiece
from tests.tokenizing import ODD_TEXTS, german_sentencepiece, stream, with_byte_pieces


def load(serialized: bytes) -> SentencePieceTokenizer:
    spec = TokenizerSpec(kind="sentencepiece", source_model="sentencepiece.model", target_model="sentencepiece.model")
    return SentencePieceTokenizer.load(spec, {"sentencepiece.model": serialized})


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return load(tiny_sentencepiece())


@pytest.fixture(scope="module")
def byte_tokenizer() -> SentencePieceTokenizer:
    return load(with_byte_pieces())


@pytest.mark.parametrize("line", TINY_LINES[::7])
def test_text_survives_its_ids(tokenizer: SentencePieceTokenizer, line: str) -> None:
    ids = tokenizer.encode(line)
    assert EOS_ID not in ids
    assert tokenizer.decode(ids) == line


@pytest.mark.parametrize("text", ["", "   ", "\n\t"], ids=repr)
def test_blank_text_has_no_ids(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.encode(text) == []


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
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


def test_each_side_has_its_own_model() -> None:
    spec = TokenizerSpec(kind="sentencepiece", source_model="source.model", target_model="target.model")
    files = {"source.model": tiny_sentencepiece(), "target.model": german_sentencepiece()}
    tokenizer = SentencePieceTokenizer.load(spec, files)
    alone = load(german_sentencepiece())
    assert (tokenizer.source_vocab_size, tokenizer.target_vocab_size) == (64, 50)
    assert tokenizer.encode("a man") == load(tiny_sentencepiece()).encode("a man")
    assert tokenizer.decode(alone.encode("ein mann läuft")) == "ein mann läuft"


def test_load_refuses_what_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"sentencepiece\.model: is no SentencePiece model"):
        load(b"no model")


def test_load_refuses_an_empty_file() -> None:
    with pytest.raises(ValueError, match=r"sentencepiece\.model: is no SentencePiece model"):
        load(b"")


def test_load_refuses_text_that_is_rewritten_after_decoding(tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("64\t41\n", encoding="utf-8")  # d becomes A
    serialized = train_sentencepiece(denormalization_rule_tsv=str(rules))
    with pytest.raises(ValueError, match="denormalization rules"):
        load(serialized)


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
def test_what_is_told_adds_up_for_other_models(options: dict[str, Any]) -> None:
    tokenizer = load(train_sentencepiece(**options))
    spaces = tokenizer.encode("a  b ") + tokenizer.encode(" ")
    for i in range(tokenizer.target_vocab_size):
        for j in (*range(4), *spaces):
            ids = [i, j, i, UNKNOWN_ID, j]
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
