"""Steps of a worker that is alone, whose decoder knows rows and no sources of several, between steps of one that is not."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from serving.bundle import Bundle
from serving.lane import Lane
from serving.request import DecodingOptions, Hypothesis, Sequence
from serving.runtime.host import HostModelSession
from tests.serving.older_bundle import as_older

# Some longer than the lane has room for at first.
LENGTHS = [3, 9, 2, 40, 5, 17, 70, 4]


def sequences(width: int) -> list[Sequence]:
    rng = random.Random(width)
    return [
        Sequence(
            source_ids=(*(rng.randrange(5, 60) for _ in range(length - 1)), 3),
            options=DecodingOptions(
                beam_size=width,
                num_hypotheses=width,
                max_target_tokens=rng.randint(3, 24),
                return_attention=rng.random() < 0.3,
                repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            ),
            arrived_at_s=0.0,
            expires_at_s=1e9,
            on_outcome=lambda outcome: None,
        )
        for length in LENGTHS
    ]


def decoded(session: HostModelSession, width: int, is_alone: Callable[[], bool]) -> list[tuple[Hypothesis, ...]]:
    """What becomes of all sequences in one lane of three slots, which they enter as others leave."""
    asked = sequences(width)
    lane = Lane(session, width=width, source_capacity=8, max_rows=3 * width, clock=lambda: 0.0)
    waiting, found = list(asked), {}
    while waiting or lane.num_rows:
        while waiting and lane.num_rows < 3 * width:
            sequence = waiting.pop(0)
            ids = np.array([sequence.source_ids])
            (encoded,) = session.encode(ids, np.array([ids.shape[1]], np.int32))
            lane.add(sequence, encoded)
        for sequence, outcome in lane.step(alone=is_alone()):
            assert outcome.error is None
            found[sequence] = outcome.hypotheses
    return [found[sequence] for sequence in asked]


def assert_same(found: list[tuple[Hypothesis, ...]], expected: list[tuple[Hypothesis, ...]]) -> None:
    """To the last bit, scores and attention included."""
    assert found == expected
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert one.score == other.score
            if one.attention is None or other.attention is None:
                assert one.attention is other.attention
            else:
                assert np.array_equal(one.attention, other.attention)


@pytest.fixture(scope="module")
def session(tiny_bundle: Bundle) -> HostModelSession:
    return HostModelSession(tiny_bundle, threads=1, lone_threads=2)


@pytest.mark.parametrize("width", [1, 2, 3, 16])
@pytest.mark.parametrize("share_alone", [0.2, 0.7, 1.0])
def test_a_lane_finds_the_same_whoever_else_works(session: HostModelSession, width: int, share_alone: float) -> None:
    rng = random.Random(7)
    expected = decoded(session, width, lambda: False)
    assert any(one.attention is not None for hypotheses in expected for one in hypotheses)
    assert_same(decoded(session, width, lambda: rng.random() < share_alone), expected)


@pytest.mark.parametrize("width", [1, 3])
def test_a_bundle_of_an_older_version_has_one_decoder_for_all(
    session: HostModelSession, tiny_bundle: Bundle, tmp_path: Path, width: int
) -> None:
    older = as_older(Path(shutil.copytree(tiny_bundle.directory, tmp_path / "bundle")))
    assert older.lone_decoder_path is None
    rng = random.Random(7)
    found = decoded(HostModelSession(older, threads=1, lone_threads=2), width, lambda: rng.random() < 0.5)
    assert_same(found, decoded(session, width, lambda: False))


def test_one_thread_is_one_decoder(tiny_bundle: Bundle) -> None:
    session = HostModelSession(tiny_bundle, threads=2, lone_threads=2)
    assert session._lone is session._shared
    assert_same(decoded(session, 2, lambda: True), decoded(session, 2, lambda: False))
