from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from serving.request import DecodingOptions, FinishReason, Hypothesis
from serving.search import make_lane_search
from tests.serving.search.reference import all_hypotheses
from tests.serving.search.toy import EOS_ID, START_ID, Job, ToyLane, ToyModel, decode

VOCABULARY = 9


def job(name: int, width: int, *, wanted: bool) -> Job:
    options = DecodingOptions(
        beam_size=width,
        num_hypotheses=width,
        max_target_tokens=4 + name % 5,
        return_attention=wanted,
    )
    return Job(name=name, model=ToyModel(name, VOCABULARY, eos_bias=1.0), options=options, source_tokens=1 + name % 6)


def check(job: Job, hypotheses: tuple[Hypothesis, ...]) -> None:
    """Each token has what the step attended to that led to it."""
    assert len(hypotheses) == job.options.num_hypotheses
    for hypothesis in hypotheses:
        assert hypothesis.attention is not None
        assert hypothesis.attention.shape == (len(hypothesis.target_ids), job.source_tokens)
        for place, row in enumerate(hypothesis.attention):
            assert row.tolist() == job.model.attention(hypothesis.target_ids[:place], job.source_tokens), place


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_hypothesis_has_the_attention_of_its_own_past(width: int) -> None:
    for name in range(12):
        one = job(name, width, wanted=True)
        check(one, decode(one, VOCABULARY))


@pytest.mark.parametrize("width", [1, 3])
def test_hidden_tokens_have_none(width: int) -> None:
    one = job(3, width, wanted=True)
    hiding = dataclasses.replace(one, options=dataclasses.replace(one.options, hidden_prefix_tokens=2))
    for whole, rest in zip(decode(one, VOCABULARY), decode(hiding, VOCABULARY), strict=True):
        assert whole.attention is not None
        assert rest.attention is not None
        assert rest.attention.tolist() == whole.attention[2:].tolist()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_those_who_ask_and_those_who_do_not_share_a_lane(width: int) -> None:
    jobs = [job(name, width, wanted=name % 3 == 0) for name in range(20)]
    lane = ToyLane(width, 4, VOCABULARY)
    waiting = list(jobs)
    while waiting or lane.jobs:
        while waiting and len(lane.jobs) < lane.num_slots:
            lane.add(waiting.pop(0))
        assert lane.search.needs_attention == any(one.options.return_attention for one in lane.jobs)
        lane.step()
    assert not lane.search.needs_attention
    for one in jobs:
        unasked = dataclasses.replace(one, options=dataclasses.replace(one.options, return_attention=False))
        assert lane.hypotheses[one.name] == decode(unasked, VOCABULARY)
        if one.options.return_attention:
            check(one, lane.hypotheses[one.name])
        else:
            assert all(hypothesis.attention is None for hypothesis in lane.hypotheses[one.name])


@pytest.mark.parametrize("width", [1, 3])
def test_targets_that_outgrow_the_first_room(width: int) -> None:
    options = DecodingOptions(beam_size=width, num_hypotheses=width, max_target_tokens=70, return_attention=True)
    long = Job(name=0, model=ToyModel(1, VOCABULARY, impossible_ids=(EOS_ID,)), options=options)
    check(long, decode(long, VOCABULARY))


def test_what_is_told_does_not_change_with_the_next_source_of_the_slot() -> None:
    lane = ToyLane(1, 1, VOCABULARY)
    first, second = (job(name, 1, wanted=True) for name in (4, 10))
    lane.add(first)
    lane.run()
    told = [hypothesis.attention.copy() for hypothesis in lane.hypotheses[4] if hypothesis.attention is not None]
    lane.add(second)
    lane.run()
    assert [h.attention.tolist() for h in lane.hypotheses[4] if h.attention is not None] == [one.tolist() for one in told]


def test_a_step_that_does_not_tell_is_not_taken() -> None:
    search = make_lane_search(1, 1, EOS_ID, START_ID)
    search.add(0, DecodingOptions(return_attention=True), 3)
    with pytest.raises(AssertionError):
        search.advance(1, np.array([[[5, 6]]]), np.zeros((1, 1, 2), np.float32))


def covered(job: Job, hypothesis: Hypothesis) -> float:
    """A hypothesis' score with its coverage penalty, from what it was without."""
    ids = (*hypothesis.target_ids, *((EOS_ID,) if hypothesis.finish_reason is FinishReason.EOS else ()))
    steps = [job.model.attention(ids[:place], job.source_tokens) for place in range(len(ids))]
    got = [sum(step[column] for step in steps) for column in range(job.source_tokens)]
    assert hypothesis.score is not None
    return hypothesis.score + job.options.coverage_penalty * sum(math.log(min(each, 1.0)) for each in got if each > 0)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_coverage_penalty_of_a_beam_as_wide_as_all_prefixes_is_brute_force(seed: int, length_penalty: float) -> None:
    options = DecodingOptions(
        beam_size=40, num_hypotheses=40, max_target_tokens=3, length_penalty=length_penalty, coverage_penalty=0.7
    )
    one = Job(name=0, model=ToyModel(seed, 4), options=options, source_tokens=4)
    plain = all_hypotheses(one.model, dataclasses.replace(options, coverage_penalty=0.0))
    expected = sorted(((covered(one, hypothesis), hypothesis.target_ids) for hypothesis in plain), reverse=True)
    hypotheses = decode(one, vocabulary=4)
    assert [hypothesis.target_ids for hypothesis in hypotheses] == [ids for _, ids in expected]
    assert [hypothesis.target_ids for hypothesis in hypotheses] != [hypothesis.target_ids for hypothesis in plain]
    assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert [hypothesis.attention for hypothesis in hypotheses] == [None] * 40


def test_a_greedy_score_has_the_coverage_penalty_too() -> None:
    one = Job(name=0, model=ToyModel(2, VOCABULARY), options=DecodingOptions(max_target_tokens=2), source_tokens=3)
    (plain,) = decode(one, VOCABULARY)
    penalized = dataclasses.replace(one, options=dataclasses.replace(one.options, coverage_penalty=0.4))
    (hypothesis,) = decode(penalized, VOCABULARY)
    assert hypothesis.target_ids == plain.target_ids
    assert hypothesis.score == pytest.approx(covered(penalized, plain), abs=1e-5)
    assert hypothesis.score != plain.score
