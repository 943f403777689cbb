"""Steps of a worker that is alone, whose decoder knows rows and no sources of several, between steps of one that is not."""

from __future__ import annotations

import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from serving.bundle import Bundle
from serving.errors import BundleError, RequestCancelledError
from serving.kv_cache import LaneCache
from serving.lane import Lane
from serving.request import DecodingOptions, Hypothesis, Sequence
from serving.runtime.host import HostModelSession
from tests.changed_bundles import as_older, relisted

# Some longer than the lane has room for at first.
LENGTHS = [3, 9, 2, 40, 5, 17, 70, 4]
# One that leaves in the middle of the others, when the first of them is done.
DROPPED = 1
GONE = RequestCancelledError("gone")


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
    waiting = list(asked)
    found: dict[Sequence, tuple[Hypothesis, ...]] = {}
    while waiting or lane.num_rows:
        while waiting and lane.num_rows < 3 * width:
            sequence = waiting.pop(0)
            ids = np.array([sequence.source_ids])
            (encoded,) = session.encode(ids, np.array([ids.shape[1]], np.int32))
            lane.add(sequence, encoded)
        left = lane.step(alone=is_alone())
        # Nobody waits for this one any more, whenever that is.
        left += lane.drop(lambda sequence: GONE if sequence is asked[DROPPED] and found else None)
        for sequence, outcome in left:
            assert outcome.error in (None, GONE)
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


@pytest.mark.parametrize("width", [2, 16])
def test_copies_for_many_rows_are_given_back_when_others_work_again(session: HostModelSession, width: int) -> None:
    lane = Lane(session, width=width, source_capacity=8, max_rows=3 * width, clock=lambda: 0.0)
    for sequence in sequences(width)[:3]:
        ids = np.array([sequence.source_ids])
        (encoded,) = session.encode(ids, np.array([ids.shape[1]], np.int32))
        lane.add(sequence, encoded)
    before = lane.cache.nbytes
    lane.step(alone=True)
    with_copies = lane.cache.nbytes
    assert with_copies > before
    lane.step(alone=False)
    assert lane.cache.nbytes == (before if 3 * width > 32 else with_copies)


def test_memory_that_a_lane_outgrew_is_let_go(session: HostModelSession) -> None:
    lane = Lane(session, width=2, source_capacity=8, max_rows=6, clock=lambda: 0.0)
    short, long = sequences(2)[0], sequences(2)[3]
    for sequence in (short, long):
        ids = np.array([sequence.source_ids])
        (encoded,) = session.encode(ids, np.array([ids.shape[1]], np.int32))
        if sequence is long:
            assert isinstance(lane.cache, LaneCache)
            outgrown = [weakref.ref(array) for array in (lane.cache.cross_attention, lane.cache.sources_by_row(1)[0])]
        lane.add(sequence, encoded)
        lane.step(alone=sequence is short)
    assert [reference() for reference in outgrown] == [None, None]


@pytest.mark.parametrize("taken", ["attention", "candidate_ids"])
def test_a_lone_decoder_that_is_not_this_bundles_is_not_loaded(tiny_bundle: Bundle, tmp_path: Path, taken: str) -> None:
    directory = Path(shutil.copytree(tiny_bundle.directory, tmp_path / "bundle"))
    model = onnx.load(directory / "lone_decoder.onnx", load_external_data=False)
    outputs = [output for output in model.graph.output if output.name != taken]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    (directory / "lone_decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError) as caught:
        HostModelSession(relisted(directory), threads=1, lone_threads=2)
    assert caught.value.faults == ("lone_decoder.onnx: has other inputs or outputs than decoder.onnx",)


def test_a_lone_decoder_takes_weights_from_no_other_file(tiny_bundle: Bundle, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_bundle.directory, tmp_path / "bundle"))
    shutil.copyfile(directory / "weights.data", directory / "copy.data")
    model = onnx.load(directory / "lone_decoder.onnx", load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = "copy.data"
    (directory / "lone_decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"lone_decoder\.onnx: takes tensors from 'copy\.data', which is not among"):
        HostModelSession(relisted(directory), threads=1, lone_threads=2)
