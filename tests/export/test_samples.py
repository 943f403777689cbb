"""Which sources an export is measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.checkpoint import Checkpoint, read_checkpoint
from export.samples import Samples, draw_samples
from serving.errors import ExportError
from serving.tokenizers import open_tokenizer
from tests.support import EOS_ID, TINY_VOCAB_SIZE, tiny_config, write_tiny_checkpoint

WORDS = ["a", "man", "woman", "two", "dogs", "play", "with", "ball", "girl", "walks", "along", "road", "child", "eating", "ice"]
# Each different from all others.
MANY_LINES = [f"{one} {other}" for one in WORDS for other in WORDS]


def checkpoint_of(directory: Path, lines: list[str], *, max_positions: int = 128) -> Checkpoint:
    write_tiny_checkpoint(directory, tiny_config(max_positions=max_positions))
    (directory / "samples.txt").write_text("".join(f"{line}\n" for line in lines))
    return read_checkpoint(directory)


def ids_of(checkpoint: Checkpoint, lines: list[str]) -> list[list[int]]:
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    return [[*tokenizer.encode(line), EOS_ID] for line in lines]


def assert_apart(samples: Samples) -> None:
    both = [tuple(source) for source in (*samples.certify, *samples.calibrate)]
    assert len(set(both)) == len(both)


def test_a_certificate_alone_is_measured_on_the_first_lines(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, MANY_LINES)
    assert draw_samples(checkpoint, calibrate=False) == Samples("sentences", ids_of(checkpoint, MANY_LINES[:32]), [])


@pytest.mark.parametrize("number", [2, 3, 25, 48, 200])
def test_scales_and_certificate_have_every_other_line_each(tmp_path: Path, number: int) -> None:
    checkpoint = checkpoint_of(tmp_path, MANY_LINES[:number])
    samples = draw_samples(checkpoint, calibrate=True)
    used = ids_of(checkpoint, MANY_LINES[: min(number, 48)])
    assert samples == Samples("sentences", certify=used[1::2], calibrate=used[::2])
    assert_apart(samples)


def test_lines_that_are_the_same_to_the_model_are_one(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, ["a man", "  a  man ", "two dogs", "a man", "a woman"])
    expected = ids_of(checkpoint, ["a man", "two dogs", "a woman"])
    assert draw_samples(checkpoint, calibrate=True) == Samples("sentences", expected[1:2], [expected[0], expected[2]])
    assert draw_samples(checkpoint, calibrate=False).certify == expected


def test_lines_that_are_the_same_once_they_are_cut_are_one(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, ["a man a man a man", "a man a man a woman", "two dogs"], max_positions=4)
    samples = draw_samples(checkpoint, calibrate=True)
    assert [len(samples.certify), len(samples.calibrate)] == [1, 1]
    assert max(map(len, samples.certify + samples.calibrate)) == 4
    assert_apart(samples)


@pytest.mark.parametrize("lines", [["a man"], ["a man", "a man", " a  man"]], ids=["one", "the same again"])
def test_one_sentence_cannot_be_for_both(tmp_path: Path, lines: list[str]) -> None:
    checkpoint = checkpoint_of(tmp_path, lines)
    with pytest.raises(ExportError, match=r"^samples\.txt: int8 needs two different sentences or more"):
        draw_samples(checkpoint, calibrate=True)
    assert draw_samples(checkpoint, calibrate=False).certify == ids_of(checkpoint, ["a man"])


@pytest.mark.parametrize("lines", [[], ["", "  "]], ids=["empty", "blank"])
def test_without_sentences_sources_are_drawn_from_the_vocabulary(tmp_path: Path, lines: list[str]) -> None:
    checkpoint = checkpoint_of(tmp_path, lines)
    alone, both = (draw_samples(checkpoint, calibrate=calibrate) for calibrate in (False, True))
    assert alone.source == both.source == "random_ids"
    assert alone.calibrate == []
    sources = (*alone.certify, *both.certify, *both.calibrate)
    assert all(source[-1] == EOS_ID and len(source) > 1 for source in sources)
    assert all(0 <= token < TINY_VOCAB_SIZE for source in sources for token in source)
    # Of those drawn, fewer where some are equal.
    assert 28 <= len(alone.certify) <= 32
    assert 20 <= len(both.certify) <= len(both.calibrate) <= 24
    assert_apart(both)


def test_every_export_draws_the_same(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, [])
    assert draw_samples(checkpoint, calibrate=True) == draw_samples(checkpoint, calibrate=True)
