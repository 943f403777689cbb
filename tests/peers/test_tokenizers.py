"""Our tokenizers beside those of the libraries whose models they belong to: the same ids, the same text.

The vocabularies are trained here. Text is that of the tests' sentences and of curious characters, but for names of special
tokens: those libraries make tokens of them, and here they stay text.
"""

from __future__ import annotations

import collections
import io
import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from serving.manifest import HuggingFaceTokenizerSpec, MosesSpec, SubwordNmtTokenizerSpec
from serving.tokenizers import ModelTokenizer, open_tokenizer
from tests.support import ENGLISH_LINES, GERMAN_LINES, TINY_LINES

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

CURIOUS = (
    "A man, 5,300.5 $ (or so) -- isn't it?  \"Yes\" he's said...",
    "the U.S. vs. Dr. Smith's e-mail: a.b@c.org, http://x.org/y?z=1 & <b>",
    "well-known semi-final, l'homme qu'il a vu, O'Reilly's",
    "„Ja“, sagte er \u2013 »nein«, \u2019s ist 1.000 € wert…",
    "日本語のテキスト。 一二三\uff0c\uff08四\uff09",
    "السلام عليكم، كيف حالك؟",
    "e\u0301 \u0301 \u00a0 a\u3000b \u200b",
    "\U0001f600\U0001f469\u200d\U0001f4bb ok",
    "@@ a@@ @-@ && &amp; [x] | 'a' `b` ``c''",
    "tab\tand line\nbreak \x07",
)
LINES = (*TINY_LINES, *CURIOUS)
MARKERS = ["<s>", "<pad>", "</s>", "<unk>"]


@contextmanager
def unbothered() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained_bpe(*, is_byte_level: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel() if is_byte_level else pre_tokenizers.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(TINY_LINES, trainer)
    model = json.loads(library.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def bart() -> Any:
    vocabulary, merges = trained_bpe(is_byte_level=True)
    return transformers.BartTokenizer(vocab=vocabulary, merges=merges)


def nllb() -> Any:
    vocabulary, merges = trained_bpe(is_byte_level=False)
    return transformers.NllbTokenizer(vocab=vocabulary, merges=merges, src_lang="eng_Latn", tgt_lang="deu_Latn")


def mbart() -> Any:
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=MARKERS, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(TINY_LINES, trainer)
    pieces = [tuple(entry) for entry in json.loads(library.to_str())["model"]["vocab"]]
    return transformers.MBart50Tokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="de_DE")


@pytest.mark.parametrize("make", [bart, nllb, mbart])
def test_a_tokenizer_json(make: Any, tmp_path: Path) -> None:
    with unbothered():
        theirs = make()
        theirs.save_pretrained(tmp_path)
    spec = HuggingFaceTokenizerSpec(kind="hugging_face", tokenizer="tokenizer.json")
    ours = open_tokenizer(spec, {"tokenizer.json": tmp_path / "tokenizer.json"})
    assert ours.vocabulary_faults(len(theirs), len(theirs)) == []
    for line in LINES:
        ids = ours.encode(line)
        assert ids == theirs.encode(line, add_special_tokens=False), line
        framed = theirs.encode(line)
        assert ours.decode(framed) == ours.decode(ids) == theirs.decode(framed, skip_special_tokens=True), line
    assert_same_texts(ours, lambda ids: theirs.decode(ids, skip_special_tokens=True), len(theirs))


def assert_same_texts(ours: ModelTokenizer, decode: Any, vocab_size: int) -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(vocab_size) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == decode(ids), ids


# Codes learned by subword-nmt, on what Moses makes of the sentences.


@pytest.fixture(scope="module")
def codes() -> str:
    learn_bpe: Any = pytest.importorskip("subword_nmt.learn_bpe", reason="subword-nmt is not installed")
    sacremoses: Any = pytest.importorskip("sacremoses", reason="sacremoses is not installed")
    moses = sacremoses.MosesTokenizer("en")
    learned = io.StringIO()
    text = "\n".join(moses.tokenize(line, return_str=True, aggressive_dash_splits=True) for line in LINES)
    with unbothered():
        learn_bpe.learn_bpe(io.StringIO(text), learned, 300)
    return learned.getvalue()


def subword_nmt_of(codes: str) -> Any:
    apply_bpe: Any = pytest.importorskip("subword_nmt.apply_bpe", reason="subword-nmt is not installed")
    return apply_bpe.BPE(io.StringIO(codes))


def vocabulary_of(words: list[str], bpe: Any) -> dict[str, int]:
    """Of the pieces that words are cut into, without the rarest, so that some are unknown."""
    counts = collections.Counter(piece for word in words for piece in bpe.segment_tokens([word]))
    return {token: i for i, token in enumerate([*MARKERS, *(piece for piece, count in counts.items() if count > 1)])}


def ours_of(codes: str, vocabulary: dict[str, int], moses: MosesSpec | None) -> ModelTokenizer:
    spec = SubwordNmtTokenizerSpec(
        kind="subword_nmt",
        source_codes="codes",
        source_vocabulary="vocabulary.json",
        target_vocabulary="vocabulary.json",
        unknown_id=3,
        special_tokens=MARKERS,
        moses=moses,
    )
    return open_tokenizer(spec, {"codes": codes.encode(), "vocabulary.json": json.dumps(vocabulary).encode()})


def random_words(seed: int, number: int) -> list[str]:
    """Words of letters as frequent as in the sentences, and now and then of any character."""
    rng = random.Random(seed)
    letters = "".join(TINY_LINES).replace(" ", "")
    words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(number)]
    odd = []
    for _ in range(99):
        odd.append("".join(chr(rng.choice((rng.randint(33, 0x2FF), rng.randint(0x4E00, 0x4EFF), 0x1F600))) for _ in range(3)))
    return [word for one in (*words, *odd, "aaaa", "ababab", "aabaabaab") for word in one.split()]


def test_byte_pair_encoding_is_that_of_subword_nmt(codes: str) -> None:
    theirs = subword_nmt_of(codes)
    words = [*random_words(1, 3000), *" ".join(LINES).split()]
    vocabulary = vocabulary_of(words, theirs)
    ours = ours_of(codes, vocabulary, None)
    for start in range(0, len(words), 20):
        text = " ".join(words[start : start + 20])
        pieces = theirs.process_line(text).split()
        assert ours.encode(text) == [vocabulary.get(piece, 3) for piece in pieces], text
        known = [piece for piece in pieces if piece in vocabulary]
        expected = (" ".join(known) + " ").replace("@@ ", "").rstrip()
        assert ours.decode([vocabulary[piece] for piece in known]) == " ".join(expected.split())


def fsmt(directory: Path, codes: str, vocabulary: dict[str, int], source: str, target: str) -> Any:
    """The same as Hugging Face's FSMT has it, the form of fairseq's WMT models: the pieces that end a word are marked."""
    renamed = {
        token if token in MARKERS else token.removesuffix("@@") if token.endswith("@@") else f"{token}</w>": i
        for token, i in vocabulary.items()
    }
    (directory / "vocabulary.json").write_text(json.dumps(renamed))
    (directory / "merges.txt").write_text("".join(f"{line}\n" for line in codes.splitlines()[1:]))
    with unbothered():
        return transformers.FSMTTokenizer(
            langs=[source, target],
            src_vocab_file=str(directory / "vocabulary.json"),
            tgt_vocab_file=str(directory / "vocabulary.json"),
            merges_file=str(directory / "merges.txt"),
        )


@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("de", "en"), ("en", "ru"), ("fr", "fr"), ("ru", "fi")])
def test_with_the_rules_of_moses(codes: str, source: str, target: str, tmp_path: Path) -> None:
    bpe = subword_nmt_of(codes)
    moses = MosesSpec(
        source_language=source, target_language=target, normalize_punctuation=True, aggressive_dash_splits=True, escape=True
    )
    vocabulary = vocabulary_of(" ".join(LINES * 2).split(), bpe)
    ours, theirs = ours_of(codes, vocabulary, moses), fsmt(tmp_path, codes, vocabulary, source, target)
    for line in LINES:
        ids = ours.encode(line)
        assert ids == theirs.encode(line, add_special_tokens=False), line
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), line
    assert_same_texts(ours, lambda ids: theirs.decode(ids, skip_special_tokens=True), len(vocabulary))


def test_fairseqs_way_through_moses(codes: str) -> None:
    """fairseq normalizes nothing, and cuts at dashes only when it is told to."""
    sacremoses: Any = pytest.importorskip("sacremoses", reason="sacremoses is not installed")
    bpe = subword_nmt_of(codes)
    vocabulary = vocabulary_of(" ".join((*ENGLISH_LINES, *GERMAN_LINES) * 2).split(), bpe)
    for dashes in (False, True):
        for escape in (False, True):
            moses = MosesSpec(
                source_language="en",
                target_language="de",
                normalize_punctuation=False,
                aggressive_dash_splits=dashes,
                escape=escape,
            )
            ours = ours_of(codes, vocabulary, moses)
            cut, put_together = sacremoses.MosesTokenizer("en"), sacremoses.MosesDetokenizer("de")
            for line in LINES:
                words = cut.tokenize(line, aggressive_dash_splits=dashes, return_str=True, escape=escape)
                pieces = bpe.process_line(words).split()
                assert ours.encode(line) == [vocabulary.get(piece, 3) for piece in pieces], line
                known = [piece for piece in pieces if piece in vocabulary]
                text = (" ".join(known) + " ").replace("@@ ", "").rstrip()
                assert ours.decode([vocabulary[piece] for piece in known]) == put_together.detokenize(text.split()), line
