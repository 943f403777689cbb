"""What holds for every search: neighbours change nothing, arrays stay where they are."""

from __future__ import annotations

import functools
import random
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.request import DecodingOptions, Hypothesis
from serving.search import make_lane_search
from tests.serving.search.toy import EOS_ID, START_ID, Job, ToyLane, ToyModel, decode

VOCABULARY = 7


def _job(name: int, width: int) -> Job:
    rng = random.Random(f"{name} {width}")
    options = DecodingOptions(
        beam_size=width,
        num_hypotheses=rng.randint(1, width),
        length_penalty=rng.choice([0.0, 0.6, 1.0, 2.0]),
        min_target_tokens=rng.choice([0, 0, 4]),
        max_target_tokens=rng.randint(1, 14),
    )
    return Job(name=name, model=ToyModel(name, VOCABULARY, eos_bias=rng.uniform(-2.0, 1.0)), options=options)


@functools.cache
def _alone(name: int, width: int) -> tuple[Hypothesis, ...]:
    return decode(_job(name, width), VOCABULARY)


@pytest.mark.parametrize("width", [1, 2, 3, 5], ids="width{}".format)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(names=st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True), rng=st.randoms(use_true_random=False))
def test_neighbours_that_come_and_go_change_no_bit(width: int, names: list[int], rng: random.Random) -> None:
    lane = ToyLane(width, num_slots=5, vocabulary=VOCABULARY, rng=rng)
    waiting = [_job(name, width) for name in names]
    evicted = set()
    while waiting or lane.jobs:
        while waiting and len(lane.jobs) < lane.num_slots and (not lane.jobs or rng.random() < 0.5):
            lane.add(waiting.pop())
        lane.step()
        if lane.jobs and rng.random() < 0.1:
            slot = rng.randrange(len(lane.jobs))
            evicted.add(lane.jobs[slot].name)
            lane.remove(slot)

    assert lane.hypotheses.keys() == set(names) - evicted
    for name, hypotheses in lane.hypotheses.items():
        assert hypotheses == _alone(name, width)


@pytest.mark.parametrize("width", [1, 4], ids="width{}".format)
def test_permuting_the_slots_permutes_the_answers(width: int) -> None:
    answers = []
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 0, 4, 2, 1]):
        lane = ToyLane(width, num_slots=6, vocabulary=VOCABULARY)
        for name in order:
            lane.add(_job(name, width))
        lane.run()
        answers.append(lane.hypotheses)
    assert answers[0] == answers[1]
    assert len(set(answers[0].values())) == 6


@pytest.mark.parametrize("width", [1, 3], ids="width{}".format)
def test_arrays_that_the_runtime_reads_stay_where_they_are(width: int) -> None:
    lane = ToyLane(width, num_slots=3, vocabulary=VOCABULARY)
    arrays = lane.search.next_ids, lane.search.num_tokens
    addresses = [array.ctypes.data for array in arrays]
    for name in (1, 2, 3):
        lane.add(_job(name, width))
    lane.run()
    assert lane.capacity > 2, "it has grown"
    assert lane.search.next_ids is arrays[0]
    assert lane.search.num_tokens is arrays[1]
    assert [array.ctypes.data for array in arrays] == addresses
    assert [array.dtype.name for array in arrays] == ["int64", "int32"]
    assert arrays[0].shape == arrays[1].shape == (3, width)


@pytest.mark.parametrize("width", [1, 3], ids="width{}".format)
def test_a_freed_slot_starts_afresh(width: int) -> None:
    lane = ToyLane(width, num_slots=1, vocabulary=VOCABULARY)
    for name in (1, 2, 1):
        lane.hypotheses.clear()
        lane.add(_job(name, width))
        assert lane.search.next_ids[0].tolist() == [START_ID] * width
        assert lane.search.num_tokens[0].tolist() == [0] * width
        lane.run()
        assert lane.hypotheses == {name: _alone(name, width)}


def test_a_lane_refuses_another_width() -> None:
    search = make_lane_search(3, 1, EOS_ID, START_ID)
    with pytest.raises(AssertionError, match="one beam width"):
        search.add(0, DecodingOptions(beam_size=2))


@pytest.mark.parametrize("width", [1, 3], ids="width{}".format)
def test_nothing_is_kept_of_a_source_that_left_or_moved(width: int) -> None:
    search = make_lane_search(width, 3, EOS_ID, START_ID)
    for slot in range(2):
        search.add(slot, DecodingOptions(beam_size=width, return_attention=True), 4)
    histories = [weakref.ref(search._sources[slot].attention) for slot in range(2)]
    search.leave(0)
    search.move(1, 0)
    assert [history() is not None for history in histories] == [False, True]
    search.leave(0)
    assert [history() is not None for history in histories] == [False, False]
    assert not search.needs_attention
