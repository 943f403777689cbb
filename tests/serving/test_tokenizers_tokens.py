from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.manifest import TokensTokenizerSpec
from serving.tokenizers import open_tokenizer
from serving.tokenizers.tokens import TokensTokenizer
from tests.tokenizing import ANY_TEXT, ODD_TEXTS, stream

SOURCE = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "▁man": 5, "@@": 6, "__de__": 7, "ein@@": 8, "<pad>2": 1}
TARGET = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "ein": 4, "Mann": 5, ".": 6, "": 7}
SPECIAL = ["<s>", "<pad>", "</s>", "__de__"]
SPEC = TokensTokenizerSpec(
    kind="tokens", source_vocabulary="source.json", target_vocabulary="target.json", unknown_id=3, special_tokens=SPECIAL
)
FILES = {"source.json": json.dumps(SOURCE).encode(), "target.json": json.dumps(TARGET).encode()}


@pytest.fixture(scope="module")
def tokenizer() -> TokensTokenizer:
    return TokensTokenizer.load(SPEC, FILES)


def test_tokens_are_what_has_spaces_between(tokenizer: TokensTokenizer) -> None:
    assert tokenizer.encode("a ▁man @@  ein@@ a") == [4, 5, 6, 8, 4]
    assert tokenizer.encode(" a\t▁man\n") == [4, 5]
    assert tokenizer.decode([4, 5, 6]) == "ein Mann ."


@pytest.mark.parametrize("text", ["", "   ", "\n\t\u3000"], ids=repr)
def test_blank_text_has_no_ids(tokenizer: TokensTokenizer, text: str) -> None:
    assert tokenizer.encode(text) == []


@pytest.mark.parametrize("text", ["b", "<unk>", "A", "ein", *SPECIAL, "<pad>2"])
def test_what_the_vocabulary_lacks_or_is_no_text_is_unknown(tokenizer: TokensTokenizer, text: str) -> None:
    assert tokenizer.encode(f"a {text} a") == [4, 3, 4]


def test_special_tokens_and_ids_without_a_token_have_no_text(tokenizer: TokensTokenizer) -> None:
    assert tokenizer.decode([0, 4, 7, 1, 99, 5, 2]) == "ein Mann"
    assert tokenizer.decode([4, 3, 5]) == "ein <unk> Mann"
    assert tokenizer.decode([]) == ""


def test_a_lone_surrogate_is_no_text(tokenizer: TokensTokenizer) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer.encode("a \ud800 a")


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_odd_text_is_encoded(tokenizer: TokensTokenizer, text: str) -> None:
    assert set(tokenizer.encode(text)) <= {3, 4}


@given(text=ANY_TEXT)
def test_no_text_makes_a_special_token(tokenizer: TokensTokenizer, text: str) -> None:
    assert set(tokenizer.encode(text)) <= {3, 4, 5, 6, 8}


@given(tokens=st.lists(st.sampled_from(["a", "▁man", "@@", "ein@@"])))
def test_known_tokens_survive_their_ids(tokens: list[str]) -> None:
    same = TokensTokenizer(SOURCE, SOURCE, 3, SPECIAL)
    assert same.decode(same.encode(" ".join(tokens))) == " ".join(tokens)


@given(ids=st.lists(st.integers(0, 9)))
def test_each_token_is_told_at_once(tokenizer: TokensTokenizer, ids: list[int]) -> None:
    deltas = stream(tokenizer, ids)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert deltas[-1] == ""


def test_vocabulary_faults(tokenizer: TokensTokenizer) -> None:
    assert tokenizer.vocabulary_faults(9, 8) == []
    assert tokenizer.vocabulary_faults(8, 7) == [
        "tokenizer: its source vocabulary has ids up to 8, the model's vocabulary is of 8",
        "tokenizer: its target vocabulary has ids up to 7, the model's vocabulary is of 7",
    ]


def test_an_unknown_id_that_the_model_does_not_have_is_a_fault() -> None:
    tokenizer = open_tokenizer(SPEC.model_copy(update={"unknown_id": 64}), FILES)
    assert tokenizer.vocabulary_faults(64, 64) == [
        "tokenizer: its source vocabulary has ids up to 64, the model's vocabulary is of 64"
    ]


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        (b"{", r"target\.json: is not JSON"),
        (b"\xff", r"target\.json: is not JSON"),
        (b'["a"]', r"target\.json: is no vocabulary"),
        (b'{"a": 1.0}', r"target\.json: is no vocabulary"),
        (b'{"a": -1}', r"target\.json: is no vocabulary"),
        (b"{}", r"target\.json: is an empty vocabulary"),
    ],
)
def test_refuses_what_is_no_vocabulary(contents: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        open_tokenizer(SPEC, FILES | {"target.json": contents})


def test_refuses_a_special_token_that_no_vocabulary_has() -> None:
    with pytest.raises(ValueError, match="special_tokens: '<blank>': in no vocabulary"):
        open_tokenizer(SPEC.model_copy(update={"special_tokens": [*SPECIAL, "<blank>"]}), FILES)
