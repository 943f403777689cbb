"""Which sources an export is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from export.checkpoint import Checkpoint, read_checkpoint
from export.samples import Sample, Samples, draw_samples
from serving.errors import ExportError
from serving.manifest import LanguagePair, LanguageTokens
from serving.tokenizers import open_tokenizer
from tests.support import EOS_ID, TINY_VOCAB_SIZE, tiny_config, write_tiny_checkpoint

WORDS = ["a", "man", "woman", "two", "dogs", "play", "with", "ball", "girl", "walks", "along", "road", "child", "eating", "ice"]
# Each different from all others.
MANY_LINES = [f"{one} {other}" for one in WORDS for other in WORDS]


CODES = {"b": 41, "a": 40, "c": 42}


def checkpoint_of(directory: Path, lines: list[str], *, max_positions: int = 128) -> Checkpoint:
    write_tiny_checkpoint(directory, tiny_config(max_positions=max_positions))
    (directory / "samples.txt").write_text("".join(f"{line}\n" for line in lines))
    return read_checkpoint(directory)


def samples_of(checkpoint: Checkpoint, lines: list[str]) -> list[Sample]:
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    return [Sample((*tokenizer.encode(line), EOS_ID)) for line in lines]


def assert_apart(samples: Samples) -> None:
    both = [sample.source_ids for sample in (*samples.certify, *samples.calibrate)]
    assert len(set(both)) == len(both)


def test_a_certificate_alone_is_measured_on_the_first_lines(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, MANY_LINES)
    assert draw_samples(checkpoint, calibrate=False) == Samples("sentences", samples_of(checkpoint, MANY_LINES[:32]), [])


@pytest.mark.parametrize("number", [2, 3, 25, 48, 200])
def test_scales_and_certificate_have_every_other_line_each(tmp_path: Path, number: int) -> None:
    checkpoint = checkpoint_of(tmp_path, MANY_LINES[:number])
    samples = draw_samples(checkpoint, calibrate=True)
    used = samples_of(checkpoint, MANY_LINES[: min(number, 48)])
    assert samples == Samples("sentences", certify=used[1::2], calibrate=used[::2])
    assert_apart(samples)


def test_lines_that_are_the_same_to_the_model_are_one(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, ["a man", "  a  man ", "two dogs", "a man", "a woman"])
    expected = samples_of(checkpoint, ["a man", "two dogs", "a woman"])
    assert draw_samples(checkpoint, calibrate=True) == Samples("sentences", expected[1:2], [expected[0], expected[2]])
    assert draw_samples(checkpoint, calibrate=False).certify == expected


def test_lines_that_are_the_same_once_they_are_cut_are_one(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, ["a man a man a man", "a man a man a woman", "two dogs"], max_positions=4)
    samples = draw_samples(checkpoint, calibrate=True)
    assert [len(samples.certify), len(samples.calibrate)] == [1, 1]
    assert max(len(sample.source_ids) for sample in samples.certify + samples.calibrate) == 4
    assert_apart(samples)


def test_what_is_around_a_text_leaves_place_for_a_token(tmp_path: Path) -> None:
    """A prefix, a language, and the end."""
    told = LanguageTokens(tokens=CODES, before_source="source", before_target=False)
    checkpoint = replace(checkpoint_of(tmp_path, MANY_LINES[:3], max_positions=8), language_tokens=told, languages=[])
    fits, does_not = (replace(checkpoint, source_prefix=(5,) * number) for number in (5, 6))
    assert {len(sample.source_ids) for sample in draw_samples(fits, calibrate=False).certify} == {8}
    with pytest.raises(ExportError, match=r"^source_prefix: takes 8 of a source's 8 tokens, .* no text fits in$"):
        draw_samples(does_not, calibrate=False)


@pytest.mark.parametrize("lines", [["a man"], ["a man", "a man", " a  man"]], ids=["one", "the same again"])
def test_one_sentence_cannot_be_for_both(tmp_path: Path, lines: list[str]) -> None:
    checkpoint = checkpoint_of(tmp_path, lines)
    with pytest.raises(ExportError, match=r"^samples\.txt: int8 needs two different sentences or more"):
        draw_samples(checkpoint, calibrate=True)
    assert draw_samples(checkpoint, calibrate=False).certify == samples_of(checkpoint, ["a man"])


@pytest.mark.parametrize("lines", [[], ["", "  "]], ids=["empty", "blank"])
def test_without_sentences_sources_are_drawn_from_the_vocabulary(tmp_path: Path, lines: list[str]) -> None:
    checkpoint = checkpoint_of(tmp_path, lines)
    alone, both = (draw_samples(checkpoint, calibrate=calibrate) for calibrate in (False, True))
    assert alone.source == both.source == "random_ids"
    assert alone.calibrate == []
    sources = [sample.source_ids for sample in (*alone.certify, *both.certify, *both.calibrate)]
    assert all(source[-1] == EOS_ID and len(source) > 1 for source in sources)
    assert all(0 <= token < TINY_VOCAB_SIZE for source in sources for token in source)
    # Of those drawn, fewer where some are equal.
    assert 28 <= len(alone.certify) <= 32
    assert 20 <= len(both.certify) <= len(both.calibrate) <= 24
    assert_apart(both)


def test_every_export_draws_the_same(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, [])
    assert draw_samples(checkpoint, calibrate=True) == draw_samples(checkpoint, calibrate=True)


# Which language's token is where, of the codes above; what is around a text of each direction, and what its target starts with.
PLACES = {
    "before a source and a target": (
        LanguageTokens(tokens=CODES, before_source="source", before_target=True),
        [((40,), (EOS_ID,), (41,)), ((41,), (EOS_ID,), (42,)), ((42,), (EOS_ID,), (40,))],
    ),
    "after a source": (
        LanguageTokens(tokens=CODES, before_source=None, after_source="source", before_target=True),
        [((), (EOS_ID, 40), (41,)), ((), (EOS_ID, 41), (42,)), ((), (EOS_ID, 42), (40,))],
    ),
    "the target's before a source": (
        LanguageTokens(tokens=CODES, before_source="target", before_target=False),
        [((41,), (EOS_ID,), ()), ((42,), (EOS_ID,), ()), ((40,), (EOS_ID,), ())],
    ),
}


@pytest.mark.parametrize(("told", "around"), PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("lines", [MANY_LINES[:7], []], ids=["sentences", "random"])
def test_each_direction_has_its_turn(
    tmp_path: Path,
    told: LanguageTokens,
    around: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]],
    lines: list[str],
) -> None:
    checkpoint = replace(
        checkpoint_of(tmp_path, lines), languages=[], language_tokens=told, source_prefix=(5,), target_prefix=(6,)
    )
    samples = draw_samples(checkpoint, calibrate=False).certify
    texts = [sample.source_ids[:-1] for sample in samples_of(checkpoint, lines)]
    for number, sample in enumerate(samples[:7]):
        before, after, first = around[number % 3]
        assert sample.target_prefix == (*first, 6)
        assert sample.source_ids[: 1 + len(before)] == (5, *before)
        assert sample.source_ids[-len(after) :] == after
        if lines:
            assert sample.source_ids == (5, *before, *texts[number], *after)


def test_pairs_have_their_turns_where_a_model_has_such(tmp_path: Path) -> None:
    told = LanguageTokens(tokens=CODES, before_source="source", before_target=False)
    pairs = [LanguagePair(source=code, target="b") for code in ("c", "a")]
    checkpoint = replace(checkpoint_of(tmp_path, MANY_LINES[:3]), language_tokens=told, languages=pairs, target_prefix=(41,))
    samples = draw_samples(checkpoint, calibrate=False).certify
    assert [(sample.source_ids[0], sample.target_prefix) for sample in samples] == [(42, (41,)), (40, (41,)), (42, (41,))]


@pytest.mark.parametrize(
    ("told", "source", "target", "around"),
    [
        (LanguageTokens(tokens=CODES, before_source="target", before_target=False), "en", "b", ((41,), (EOS_ID,), ())),
        (
            LanguageTokens(tokens=CODES, before_source=None, after_source="source", before_target=False),
            "a",
            "de",
            ((), (EOS_ID, 40), ()),
        ),
        (LanguageTokens(tokens=CODES, before_source=None, before_target=True), "en", "b", ((), (EOS_ID,), (41,))),
    ],
    ids=["target before a source", "source after it", "before a target"],
)
def test_a_language_that_the_model_is_not_told_needs_no_token(
    tmp_path: Path,
    told: LanguageTokens,
    source: str,
    target: str,
    around: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    checkpoint = replace(
        checkpoint_of(tmp_path, MANY_LINES[:1]), language_tokens=told, languages=[LanguagePair(source=source, target=target)]
    )
    (sample,) = draw_samples(checkpoint, calibrate=False).certify
    (text,) = (sample.source_ids[:-1] for sample in samples_of(checkpoint, MANY_LINES[:1]))
    before, after, first = around
    assert sample == Sample((*before, *text, *after), first)
