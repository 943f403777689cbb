from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from serving.manifest import HuggingFaceTokenizerSpec
from serving.tokenizers import open_tokenizer
from serving.tokenizers.hugging_face import HuggingFaceTokenizer
from tests.support import TINY_LINES
from tests.tokenizing import ANY_TEXT, ODD_TEXTS, stream

NAME = "tokenizer.json"
MARKERS = ["<s>", "<pad>", "</s>", "<unk>"]
LANGUAGES = ["deu_Latn", "__de__"]


def load(library: Tokenizer, *special_tokens: str) -> HuggingFaceTokenizer:
    spec = HuggingFaceTokenizerSpec(kind="hugging_face", tokenizer=NAME, special_tokens=list(special_tokens))
    return HuggingFaceTokenizer.load(spec, {NAME: library.to_str().encode()})


def byte_level() -> Tokenizer:
    """As BART has it: byte-pair encoding of bytes."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(TINY_LINES, trainer)
    return library


def unigram() -> Tokenizer:
    """As mBART has it: SentencePiece's pieces, and special tokens among the model's own."""
    library = Tokenizer(models.Unigram())
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=MARKERS, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(TINY_LINES, trainer)
    return library


def byte_fallback() -> Tokenizer:
    """As many that were made from SentencePiece have it: characters that are not known become bytes."""
    pieces = [
        *MARKERS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *dict.fromkeys("▁" + "".join(TINY_LINES)),
        "▁a",
        "an",
        "▁man",
    ]
    merges = [("▁", "a"), ("a", "n")]
    numbers = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    library = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(MARKERS)
    return library


def word_piece() -> Tokenizer:
    library = Tokenizer(models.WordPiece(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=MARKERS, show_progress=False)
    library.train_from_iterator([*TINY_LINES, "do n't , it 's a man ."], trainer)
    return library


def suffixed() -> Tokenizer:
    """A decoder that says something else of the last token than of the same before others."""
    library = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=MARKERS, end_of_word_suffix="</w>", show_progress=False)
    library.train_from_iterator(TINY_LINES, trainer)
    return library


MADE = {make.__name__: make() for make in (byte_level, unigram, byte_fallback, word_piece, suffixed)}
LOADED = {name: load(library) for name, library in MADE.items()}
# Those that tell something before the end.
TELLING = sorted(LOADED.keys() - {"suffixed"})


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("line", TINY_LINES[::9])
def test_text_survives_its_ids(name: str, line: str) -> None:
    tokenizer = LOADED[name]
    assert tokenizer.encode(line) == MADE[name].encode(line).ids
    assert tokenizer.decode(tokenizer.encode(line)) == line


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u3000"], ids=repr)
def test_blank_text_has_no_ids(name: str, text: str) -> None:
    assert LOADED[name].encode(text) == []


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_odd_text_is_encoded_within_the_vocabulary(name: str, text: str) -> None:
    ids = LOADED[name].encode(text)
    assert all(0 <= i < MADE[name].get_vocab_size() for i in ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_text_of_bytes_survives_whatever_it_is(name: str, text: str) -> None:
    assert LOADED[name].decode(LOADED[name].encode(text)) == text


@pytest.mark.parametrize("name", LOADED)
def test_a_lone_surrogate_is_no_text(name: str) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        LOADED[name].encode("a \ud800 man")


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("marker", ["<s>", "<pad>", "</s>"])
@pytest.mark.parametrize("frame", ["{}", "{} a man", "a man {}", "a{}b", "{0}{0}"])
def test_markers_in_text_are_only_text(name: str, marker: str, frame: str) -> None:
    ids = LOADED[name].encode(frame.format(marker))
    assert ids != []
    assert MADE[name].token_to_id(marker) not in ids
    assert MADE[name].token_to_id(marker) in MADE[name].encode(frame.format(marker)).ids


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_markers_in_text_survive_where_all_text_does(name: str) -> None:
    assert LOADED[name].decode(LOADED[name].encode("a </s> man<pad>")) == "a </s> man<pad>"


@pytest.mark.parametrize("name", LOADED)
@settings(deadline=None)
@given(text=ANY_TEXT)
def test_no_text_makes_a_special_token(name: str, text: str) -> None:
    forbidden = {MADE[name].token_to_id(marker) for marker in ("<s>", "<pad>", "</s>")}
    assert not forbidden & set(LOADED[name].encode(text))


def test_a_marker_that_normalization_makes_is_unknown() -> None:
    ids = LOADED["unigram"].encode("a \uff1c/s\uff1e")  # full-width signs, which become those of the marker
    assert MADE["unigram"].token_to_id("</s>") not in ids
    assert MADE["unigram"].token_to_id("<unk>") in ids


def test_a_marker_is_left_out_where_nothing_is_unknown() -> None:
    library = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    library.add_special_tokens(["ab"])
    assert load(library).encode("aab") == [0]


def with_languages() -> Tokenizer:
    """One language that the file adds without calling it special, and one that is only among the model's own tokens."""
    library = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "man": 2, "__de__": 3}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<unk>"])
    library.add_tokens([AddedToken("deu_Latn")])
    return library


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("frame", ["{}", "{} a man", "a man {}", "{0} {0}"])
def test_further_special_tokens_in_text_are_only_text(language: str, frame: str) -> None:
    library = with_languages()
    language_id = library.token_to_id(language)
    assert language_id in load(library).encode(frame.format(language))
    ids = load(library, *LANGUAGES).encode(frame.format(language))
    assert language_id not in ids
    assert 0 in ids


def test_special_tokens_and_unknown_ids_have_no_text() -> None:
    tokenizer = load(with_languages(), *LANGUAGES)
    assert tokenizer.decode([3, 4, 1, 0, 99, 2, 4]) == "a man"
    assert tokenizer.decode([]) == ""


def test_the_files_own_special_tokens_cuts_and_padding_are_not_used() -> None:
    library = byte_level()
    plain = load(library).encode("a man runs")
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    library.enable_truncation(3)
    library.enable_padding(length=32)
    assert load(library).encode("a man runs") == plain


@pytest.mark.parametrize("name", LOADED)
@settings(deadline=None)
@given(data=st.data(), text=ANY_TEXT)
def test_what_is_told_adds_up(name: str, data: st.DataObject, text: str) -> None:
    tokenizer = LOADED[name]
    ids = st.lists(st.integers(0, MADE[name].get_vocab_size() + 2), max_size=12)
    drawn = [*data.draw(ids), *tokenizer.encode(text), *data.draw(ids)]
    assert "".join(stream(tokenizer, drawn)) == tokenizer.decode(drawn)


@pytest.mark.parametrize("name", TELLING)
def test_words_are_told_as_they_come(name: str) -> None:
    ids = LOADED[name].encode("a man runs in the park")
    deltas = stream(LOADED[name], ids)
    assert deltas[0] != ""
    assert deltas[-1] == ""


def test_a_character_is_told_when_its_last_byte_is_there() -> None:
    tokenizer = LOADED["byte_level"]
    assert stream(tokenizer, tokenizer.encode("a €"))[-4:] == ["", "", "€", ""]


def test_bytes_are_told_when_a_token_follows_that_is_none() -> None:
    # Bytes of which some are no character are none of them one, so that even a whole character is not certain.
    tokenizer, ids = LOADED["byte_fallback"], LOADED["byte_fallback"].encode("€")[1:]
    assert stream(tokenizer, ids) == ["", "", "", "€"]
    assert stream(tokenizer, [*ids, ids[0]]) == ["", "", "", "", "\ufffd" * 4]
    assert stream(tokenizer, [*ids, *tokenizer.encode("a")])[3] == "€ a"


def test_what_a_further_token_may_change_is_told_at_the_end() -> None:
    tokenizer = LOADED["suffixed"]
    ids = tokenizer.encode("two dogs")
    assert stream(tokenizer, ids) == [*([""] * len(ids)), "two dogs"]


def test_vocabulary_faults() -> None:
    tokenizer = load(with_languages())
    assert tokenizer.vocabulary_faults(5, 5) == []
    assert tokenizer.vocabulary_faults(4, 9) == [
        "tokenizer: its source vocabulary has ids up to 4, the model's vocabulary is of 4"
    ]


def edited(change: Any) -> bytes:
    document = json.loads(with_languages().to_str())
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        pytest.param(b"", "is no tokenizer", id="empty"),
        pytest.param(b"\xff\xfe", "is no tokenizer", id="bytes"),
        pytest.param(b"[]", "is no tokenizer", id="list"),
        pytest.param(b'{"version": "9.0"}', "is no tokenizer", id="version"),
        pytest.param(edited(lambda d: d.pop("model")), "is no tokenizer", id="no model"),
        pytest.param(edited(lambda d: d["model"].update(type="Magic")), "is no tokenizer", id="unknown model"),
        pytest.param(edited(lambda d: d["model"].update(unk_token="gone")), "does not take all text", id="unknown token"),
        pytest.param(edited(lambda d: d["model"].update(vocab={}) or d.update(added_tokens=[])), "has no tokens", id="no tokens"),
        pytest.param(
            edited(lambda d: d.update(decoder={"type": "Strip", "content": " ", "start": 0, "stop": 1})),
            "takes characters from the end",
            id="strip",
        ),
        pytest.param(
            edited(
                lambda d: d.update(
                    decoder={
                        "type": "Sequence",
                        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}],
                    }
                )
            ),
            "takes characters from the end",
            id="strip in a sequence",
        ),
    ],
)
def test_refuses_what_is_no_tokenizer(contents: bytes, fault: str) -> None:
    spec = HuggingFaceTokenizerSpec(kind="hugging_face", tokenizer=NAME)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{fault}"):
        open_tokenizer(spec, {NAME: contents})


def test_refuses_a_special_token_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"special_tokens: 'fra_Latn': not in tokenizer\.json"):
        load(with_languages(), "deu_Latn", "fra_Latn")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = with_languages()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"of kind 'hugging_face' .*pip install 'onnxlate\[tokenizers\]'"):
        load(library)
