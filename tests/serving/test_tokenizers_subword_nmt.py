from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacremoses import MosesTokenizer

from serving.manifest import MosesSpec, SubwordNmtTokenizerSpec
from serving.tokenizers import open_tokenizer
from serving.tokenizers.moses import Moses
from serving.tokenizers.subword_nmt import SubwordNmtTokenizer
from tests.tokenizing import ANY_TEXT, ODD_TEXTS, stream

MARKERS = ["<s>", "<pad>", "</s>", "<unk>"]
SPECIAL = ["<s>", "<pad>", "</s>", "__de__"]


def merges_of(word: str) -> list[str]:
    """Codes that make one piece of a word, from the left."""
    symbols = [*word[:-1], f"{word[-1]}</w>"]
    return [f"{''.join(symbols[:i])} {symbols[i]}" for i in range(1, len(symbols))]


WORDS = ("man", "@-@", "&apos;s", "&quot;")
MERGES = [*dict.fromkeys(merge for word in WORDS for merge in merges_of(word)), "r u", "n s</w>", "ru ns</w>"]
# Pieces as words are cut into, of which some are characters that no code has, and others in which rules of Moses see more.
PIECES = [
    *("a", "man", "ma@@", "n", "n@@", "m@@", "runs", "ru@@", "r@@", "u@@", "ns", "s", "s@@", "t", "t@@", "o", "o@@", "k"),
    *(".", ",", "?", "(", ")", "$", '"', "@-@", "@@@", "@", "-", "&@@", ";", "a@@", "q@@", "u", "'s", "'", "l'", ":", "EU:"),
    *("&quot;", "&apos;", "&apos;s", "&apos;@@", "„", "“", "ssa", "na", "5", "5@@", "日", "日@@", "本", "é", "e@@", "\u0301"),
    "\U0001f600",
]
VOCABULARY = {token: i for i, token in enumerate([*MARKERS, *PIECES, "__de__"])}
UNKNOWN_ID = VOCABULARY["<unk>"]
CODES = "\n".join(("#version: 0.2", *MERGES)) + "\n"
# The languages that Moses' rules for putting words together know, a few of those that it does not, and none.
LANGUAGES = ["en", "de", "fr", "it", "ga", "fi", "cs", "zh", "ja", "ko", "ru", "xx"]


def moses(language: str = "en") -> MosesSpec:
    return MosesSpec(
        source_language=language,
        target_language=language,
        normalize_punctuation=False,
        aggressive_dash_splits=True,
        escape=True,
    )


def spec_of(rules: MosesSpec | None = None, special_tokens: Sequence[str] = SPECIAL) -> SubwordNmtTokenizerSpec:
    return SubwordNmtTokenizerSpec(
        kind="subword_nmt",
        source_codes="codes",
        source_vocabulary="source.json",
        target_vocabulary="target.json",
        unknown_id=UNKNOWN_ID,
        special_tokens=list(special_tokens),
        moses=rules,
    )


def files_of(codes: str | bytes = CODES) -> dict[str, bytes]:
    vocabulary = json.dumps(VOCABULARY).encode()
    contents = codes.encode() if isinstance(codes, str) else codes
    return {"codes": contents, "source.json": vocabulary, "target.json": vocabulary}


def load(rules: MosesSpec | None = None) -> SubwordNmtTokenizer:
    return SubwordNmtTokenizer.load(spec_of(rules), files_of())


PLAIN = load()
WITH_MOSES = {language: load(moses(language)) for language in LANGUAGES}
ENGLISH = WITH_MOSES["en"]


def names_of(ids: Sequence[int]) -> list[str]:
    tokens = list(VOCABULARY)
    return [tokens[i] for i in ids]


def ids_of(*tokens: str) -> list[int]:
    return [VOCABULARY[token] for token in tokens]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("man", ["man"]),
        ("a man runs", ["a", "man", "runs"]),
        ("mas", ["ma@@", "s"]),
        ("manruns", ["ma@@", "n@@", "runs"]),
        ("ruma", ["ru@@", "m@@", "a"]),
        ("ruxa", ["ru@@", "<unk>", "a"]),
        ("n", ["n"]),
        ("日本", ["日@@", "本"]),
        ("日a", ["日@@", "a"]),
        ("x man", ["<unk>", "man"]),
        ("xs", ["<unk>", "s"]),
        ("  a\t man\n", ["a", "man"]),
    ],
)
def test_words_are_cut_by_the_codes(text: str, pieces: list[str]) -> None:
    assert names_of(PLAIN.encode(text)) == pieces


def test_codes_of_fastbpe_are_the_same() -> None:
    counted = "".join(f"{merge} {100 - i}\n" for i, merge in enumerate(MERGES))
    tokenizer = open_tokenizer(spec_of(), files_of(counted))
    for text in ("a man runs", "manruns", "ruma", "@-@"):
        assert tokenizer.encode(text) == PLAIN.encode(text)


def test_of_a_code_that_occurs_twice_the_first_counts() -> None:
    codes = "#version: 0.2\nm a\na n</w>\nm a\n"
    tokenizer = open_tokenizer(spec_of(), files_of(codes))
    assert names_of(tokenizer.encode("man")) == ["ma@@", "n"]


def test_moses_cuts_a_source_into_words() -> None:
    assert names_of(ENGLISH.encode('a man\'s "man-man".')) == (
        ["a", "man", "&apos;s", "&quot;", "man", "@-@", "man", "&quot;", "."]
    )


def test_moses_rules_are_those_asked_for() -> None:
    rules = moses().model_copy(update={"escape": False, "aggressive_dash_splits": False, "normalize_punctuation": True})
    tokenizer = load(rules)
    assert names_of(tokenizer.encode("a „man“ ''\u200b")) == ["a", '"', "man", '"', '"']
    assert names_of(load(rules.model_copy(update={"normalize_punctuation": False})).encode("„ man“"))[:2] == ["„", "man"]
    assert names_of(tokenizer.encode("a-a")) == ["a@@", "<unk>", "a"]


def test_moses_puts_words_together() -> None:
    ids = ids_of("(", "a", "ma@@", "n", "&apos;s", "&quot;", "man", "@-@", "man", "&quot;", ")", ",", "ru@@", "ns", ".")
    assert ENGLISH.decode(ids) == '(a man\'s "man-man"), runs.'
    assert PLAIN.decode(ids) == "( a man &apos;s &quot; man @-@ man &quot; ) , runs ."


FULL_STOPS = st.lists(st.sampled_from(["a.b.", "U.S.", "Mr.", "x.", "l'a", " ", "5.", ".'", "日."])).map("".join)


@pytest.mark.parametrize("language", ["en", "de", "fr", "ko"])
def test_words_are_those_of_sacremoses(language: str) -> None:
    theirs, ours = MosesTokenizer(language), Moses(moses(language))

    @settings(deadline=None)
    @given(text=st.one_of(ANY_TEXT, FULL_STOPS))
    def compare(text: str) -> None:
        plain: str = theirs.tokenize(text, aggressive_dash_splits=True, return_str=True, escape=True)
        assert ours.split(text) == plain.split()

    compare()


@pytest.mark.parametrize(
    ("text", "longest"),
    [("." * 250, 100), ("\u2026" * 250, 300), ("DOT" * 250, 300), ("a" * 5000, 5000), ("." * 100, 100)],
    ids=["dots", "ellipses", "DOT", "a", "just so many dots"],
)
def test_long_runs_that_take_sacremoses_too_long_are_cut(text: str, longest: int) -> None:
    rules = Moses(moses("de").model_copy(update={"normalize_punctuation": True}))
    words = rules.split(text)
    assert "".join(words) == text.replace("\u2026", "...")
    assert max(map(len, words)) == longest


@pytest.mark.parametrize("tokenizer", [PLAIN, ENGLISH], ids=["words", "Moses"])
def test_special_tokens_and_ids_without_a_piece_have_no_text(tokenizer: SubwordNmtTokenizer) -> None:
    special = ids_of(*SPECIAL)
    assert tokenizer.decode([*special, *ids_of("ma@@"), 10**6, *special, *ids_of("n", "runs"), *special]) == "man runs"
    assert tokenizer.decode(special) == ""
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", [PLAIN, ENGLISH], ids=["words", "Moses"])
def test_a_word_that_was_cut_off_is_told(tokenizer: SubwordNmtTokenizer) -> None:
    assert tokenizer.decode(ids_of("a", "ru@@")) == "a ru"


def test_a_czech_sentence_that_sacremoses_stumbles_over() -> None:
    assert WITH_MOSES["cs"].decode(ids_of("l'", "-", "ma@@", "s")) == "l' - mas"
    vocabulary = {"e'": 0, "-": 1, "mail": 2}
    spec = spec_of(moses("cs"), special_tokens=[]).model_copy(update={"unknown_id": 0})
    contents = json.dumps(vocabulary).encode()
    tokenizer = open_tokenizer(spec, files_of() | {"source.json": contents, "target.json": contents})
    assert tokenizer.decode([0, 1, 2]) == "e' - mail"


@pytest.mark.parametrize("tokenizer", [PLAIN, ENGLISH], ids=["words", "Moses"])
@pytest.mark.parametrize("text", ["", "   ", "\n\t\u3000"], ids=repr)
def test_blank_text_has_no_ids(tokenizer: SubwordNmtTokenizer, text: str) -> None:
    assert tokenizer.encode(text) == []


@pytest.mark.parametrize("language", [None, *LANGUAGES])
@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_odd_text_is_encoded_within_the_vocabulary(language: str | None, text: str) -> None:
    tokenizer = WITH_MOSES[language] if language else PLAIN
    assert set(tokenizer.encode(text)) <= set(VOCABULARY.values())


@pytest.mark.parametrize("tokenizer", [PLAIN, ENGLISH], ids=["words", "Moses"])
def test_a_lone_surrogate_is_no_text(tokenizer: SubwordNmtTokenizer) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer.encode("a \ud800 man")


def test_codes_that_spell_a_special_token_make_it_unknown() -> None:
    codes = "#version: 0.2\n_ _\nd e\n__ de\n__de _\n__de_ _</w>\n"
    tokenizer = open_tokenizer(spec_of(), files_of(codes))
    assert names_of(tokenizer.encode("__de__ a")) == ["<unk>", "a"]
    careless = open_tokenizer(spec_of(special_tokens=["<s>"]), files_of(codes))
    assert names_of(careless.encode("__de__ a")) == ["__de__", "a"]


@pytest.mark.parametrize("language", [None, "en", "fr", "ko"])
@settings(deadline=None)
@given(text=ANY_TEXT)
def test_no_text_makes_a_special_token(language: str | None, text: str) -> None:
    tokenizer = WITH_MOSES[language] if language else PLAIN
    assert not set(ids_of(*SPECIAL)) & set(tokenizer.encode(text))


@given(words=st.lists(st.sampled_from(["a", "man", "runs", "mas", "manruns", "日本", "t", "-", "@-@"])))
def test_known_words_survive_their_ids(words: list[str]) -> None:
    assert PLAIN.decode(PLAIN.encode(" ".join(words))) == " ".join(words)


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["a", "man", "runs", "mas", "man-man", "man's", "(a man)", '"a man"', "man,", "man."])))
def test_moses_round_trip(words: list[str]) -> None:
    text = " ".join(words)
    rules = ENGLISH._moses
    assert rules is not None
    assert ENGLISH.decode(ENGLISH.encode(text)) == rules.join(rules.split(text))


IDS = st.lists(st.integers(0, len(VOCABULARY) + 1), max_size=16)


@settings(deadline=None)
@given(ids=IDS)
def test_each_piece_is_told_at_once_without_moses(ids: list[int]) -> None:
    deltas = stream(PLAIN, ids)
    assert "".join(deltas) == PLAIN.decode(ids)
    assert deltas[-1] == ""


@pytest.mark.parametrize("language", LANGUAGES)
@settings(deadline=None)
@given(ids=IDS)
def test_what_is_told_adds_up(language: str, ids: list[int]) -> None:
    tokenizer = WITH_MOSES[language]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_word_is_told_when_the_next_one_is_there() -> None:
    ids = ids_of("a", "ma@@", "n", "&apos;s", "man", ".")
    assert stream(ENGLISH, ids) == ["", "", "a", " man", "'s", " man", "."]


def test_words_that_a_dash_makes_one_are_told_together() -> None:
    ids = ids_of(",", "@-@", "s", "a", "t")
    assert stream(ENGLISH, ids) == ["", "", "", ",-s", " a", " t"]


def test_czech_is_told_at_the_end() -> None:
    ids = ids_of("a", "man", "runs", ".")
    assert stream(WITH_MOSES["cs"], ids) == ["", "", "", "", "a man runs."]


def test_vocabulary_faults() -> None:
    assert PLAIN.vocabulary_faults(len(VOCABULARY), len(VOCABULARY)) == []
    assert PLAIN.vocabulary_faults(9, len(VOCABULARY)) == [
        f"tokenizer: its source vocabulary has ids up to {len(VOCABULARY) - 1}, the model's vocabulary is of 9"
    ]


@pytest.mark.parametrize(
    ("codes", "fault"),
    [
        pytest.param("#version: 0.3\na b\n", r"codes: codes of version '0\.3' are not supported, only 0\.2", id="version"),
        pytest.param("a b\nab c\n", r"codes: codes without a line '#version:' are of version 0\.1", id="no version"),
        pytest.param("#version: 0.2\na b\na\n", "codes: line 3 is no code: 'a'", id="one symbol"),
        pytest.param("#version: 0.2\na b c\n", "codes: line 2 is no code: 'a b c'", id="three symbols"),
        pytest.param("#version: 0.2\na  b\n", "codes: line 2 is no code: 'a  b'", id="an empty symbol"),
        pytest.param("#version: 0.2\n\na b\n", "codes: line 2 is no code: ''", id="a blank line"),
        pytest.param("a b 3\nc\n", "codes: line 2 is no code: 'c'", id="fastBPE"),
        pytest.param("", "codes: line 1 is no code: ''", id="empty"),
        pytest.param(b"\xff\xfe", "codes: is not UTF-8", id="bytes"),
    ],
)
def test_refuses_what_are_no_codes(codes: str | bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        open_tokenizer(spec_of(), files_of(codes))


@pytest.mark.parametrize("name", ["source.json", "target.json"])
def test_refuses_what_is_no_vocabulary(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: is no vocabulary"):
        open_tokenizer(spec_of(), files_of() | {name: b"[]"})


def test_refuses_a_special_token_that_no_vocabulary_has() -> None:
    with pytest.raises(ValueError, match="special_tokens: '<blank>': in no vocabulary"):
        open_tokenizer(spec_of(special_tokens=["<blank>"]), files_of())


@pytest.mark.parametrize("package", ["tokenizers", "sacremoses"])
def test_without_a_library_the_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"of kind 'subword_nmt' .*{package}.*pip install 'onnxlate\[tokenizers\]'"):
        load(moses())
