"""Marian's search: beams that shrink, a token that is passed over, a penalty of each token; against searches written out."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from serving.request import DecodingOptions, FinishReason, PrefixBias
from serving.search import Advance, Fork, make_lane_search
from tests.serving.search.reference import beam_search, greedy_search, shrinking_beam_search
from tests.serving.search.test_ends import check_same
from tests.serving.search.toy import EOS_ID, START_ID, Job, ToyLane, ToyModel, decode

OTHER = 3


def drawn(seed: int) -> tuple[ToyModel, DecodingOptions, int]:
    """A model, options and a vocabulary."""
    rng = random.Random(seed)
    vocabulary = rng.choice([4, 6, 12, 30])
    width = rng.randint(2, 6)
    options = DecodingOptions(
        beam_size=width,
        num_hypotheses=rng.randint(1, width),
        length_penalty=rng.choice([0.0, 0.6, 1.0, 1.7]),
        word_penalty=rng.choice([0.0, 0.0, 0.4, -0.7]),
        min_target_tokens=rng.choice([0, 0, 0, 3]),
        max_target_tokens=rng.randint(1, 12),
        passed_over_id=rng.choice([None, OTHER]),
        shrinking_beam=True,
    )
    return ToyModel(seed, vocabulary, eos_bias=rng.uniform(-3.0, 3.0)), options, vocabulary


@pytest.mark.parametrize("seed", range(300), ids="seed{}".format)
def test_it_agrees_with_the_reference(seed: int) -> None:
    model, options, vocabulary = drawn(seed)
    hypotheses = decode(Job(name=0, model=model, options=options), vocabulary)
    assert list(hypotheses) == shrinking_beam_search(model, options)
    wider = replace(options, shrinking_beam=False)
    assert list(decode(Job(name=0, model=model, options=wider), vocabulary)) == beam_search(model, wider)


def test_it_finds_other_translations_than_a_beam_that_keeps_its_width() -> None:
    differing = 0
    for seed in range(100):
        model, options, vocabulary = drawn(seed)
        found = [
            decode(Job(name=0, model=model, options=replace(options, num_hypotheses=1, shrinking_beam=shrinks)), vocabulary)
            for shrinks in (False, True)
        ]
        differing += found[0] != found[1]
    assert differing > 5


def test_it_is_over_with_the_last_of_as_many_ends_as_beams() -> None:
    """One end takes one place: three are left to go on with, then one."""
    search = make_lane_search(4, 1, EOS_ID, START_ID)
    search.add(0, DecodingOptions(beam_size=4, num_hypotheses=4, length_penalty=0.0, max_target_tokens=8, shrinking_beam=True))

    def step(*rows: dict[int, float]) -> list[int]:
        ids = np.full((1, 4, 9), 99, np.int64)
        log_probs = np.full((1, 4, 9), -np.inf, np.float32)
        for row, candidates in enumerate(rows):
            ids[0, row, : len(candidates)] = list(candidates)
            log_probs[0, row, : len(candidates)] = list(candidates.values())
        return search.advance(1, ids, log_probs).finished

    assert step({5: -1.0, EOS_ID: -2.0, 6: -3.0, 7: -4.0, 8: -5.0}) == []
    assert step({EOS_ID: -0.1, 9: -0.2, 10: -9.0}, {EOS_ID: -0.5, 9: -0.6}, {9: -7.0}) == []
    assert step({11: -0.1, EOS_ID: -0.25}, {EOS_ID: -0.1}, {EOS_ID: -0.1}, {EOS_ID: -0.1}) == []
    assert step({EOS_ID: -0.5}, {EOS_ID: -0.5}, {EOS_ID: -0.5}, {EOS_ID: -0.5}) == [0]
    hypotheses = search.hypotheses(0)
    assert [(one.target_ids, one.finish_reason) for one in hypotheses] == [
        ((5,), FinishReason.EOS),
        ((5, 9, 11), FinishReason.EOS),
        ((), FinishReason.EOS),
        ((6,), FinishReason.EOS),
    ]


@pytest.mark.parametrize("seed", range(60), ids="seed{}".format)
def test_neighbours_change_nothing(seed: int) -> None:
    """Sources of one lane that search in all ways, and come and go, find what they find alone."""
    rng = random.Random(seed)
    lane = ToyLane(width=3, num_slots=4, vocabulary=12, rng=rng)
    jobs = []
    for name in range(6):
        _, options, _ = drawn(100 * seed + name)
        options = replace(options, beam_size=3, num_hypotheses=2, shrinking_beam=rng.random() < 0.5)
        jobs.append(Job(name=name, model=ToyModel(100 * seed + name, 12, eos_bias=rng.uniform(-2.0, 2.0)), options=options))
    waiting = list(jobs)
    while waiting or lane.jobs:
        while waiting and len(lane.jobs) < 4:
            lane.add(waiting.pop(0))
        lane.step()
    for job in jobs:
        assert lane.hypotheses[job.name] == decode(job, 12)


@pytest.mark.parametrize("min_target_tokens", [0, 4])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(20), ids="seed{}".format)
def test_a_token_that_is_passed_over_keeps_its_share(seed: int, width: int, min_target_tokens: int) -> None:
    model = ToyModel(seed, 8, eos_bias=1.0)
    options = DecodingOptions(
        beam_size=width,
        num_hypotheses=width,
        min_target_tokens=min_target_tokens,
        max_target_tokens=8,
        passed_over_id=OTHER,
    )
    reference = greedy_search if width == 1 else beam_search
    check_same(decode(Job(name=0, model=model, options=options), 8), reference(model, options))
    # Beside rules, which look at all logits.
    too_long = tuple(range(3, 8)) * 2
    ruled = decode(Job(name=0, model=model, options=replace(options, suppressed=(too_long,))), 8)
    check_same(ruled, reference(model, options))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    "asked",
    [
        DecodingOptions(target_prefix=(5, OTHER)),
        DecodingOptions(prefix_bias=PrefixBias(tokens=(5, OTHER), strength=0.9)),
        DecodingOptions(prefix_bias=PrefixBias(tokens=(5, OTHER), strength=0.9), min_target_tokens=2),
    ],
    ids=["told", "wished", "wished-of-some-length"],
)
def test_a_token_that_is_passed_over_may_be_told_or_wished(width: int, asked: DecodingOptions) -> None:
    for seed in range(5):
        options = replace(asked, beam_size=width, max_target_tokens=8, passed_over_id=OTHER)
        (best,) = decode(Job(name=0, model=ToyModel(seed, 8, eos_bias=-2.0), options=options), 8)
        assert best.target_ids[:2] == (5, OTHER)
        assert OTHER not in best.target_ids[2:]


@pytest.mark.parametrize("seed", range(40), ids="seed{}".format)
def test_a_reward_of_each_token_lets_no_search_stop_at_the_first_end(seed: int) -> None:
    model = ToyModel(seed, 12, eos_bias=1.0)
    options = DecodingOptions(
        beam_size=3, num_hypotheses=1, length_penalty=0.0, word_penalty=-2.0, early_stopping=True, max_target_tokens=10
    )
    # The rules of generate know no such end of a search, and change nothing else here.
    patient = replace(options, rules_of_generate=True)
    assert decode(Job(name=0, model=model, options=options), 12) == decode(Job(name=0, model=model, options=patient), 12)


def test_the_best_extra_child_takes_the_lowest_dead_row() -> None:
    """Also one that nothing possible would go on in: among equals the lower row is first in the next step."""
    search = make_lane_search(3, 1, EOS_ID, START_ID)
    search.add(0, DecodingOptions(beam_size=3, num_hypotheses=3, max_target_tokens=8, shrinking_beam=True))

    def step(*rows: dict[int, float]) -> Advance:
        ids = np.full((1, 3, 7), 99, np.int64)
        log_probs = np.full((1, 3, 7), -np.inf, np.float32)
        for row, candidates in enumerate(rows):
            ids[0, row, : len(candidates)] = list(candidates)
            log_probs[0, row, : len(candidates)] = list(candidates.values())
        return search.advance(1, ids, log_probs)

    assert step({EOS_ID: -0.5, 5: -1.0, 6: -1.0}).forks == []
    assert search.decoded(0)[:2] == [[5], [6]]
    # Two run. Both children are of row 1; rows 0 and 2 are dead.
    advance = step({}, {7: -1.0, 8: -1.0, 9: -1.0})
    assert advance.forks == [Fork(1, 0, 1, 2)]
    assert search.decoded(0)[:2] == [[6, 8], [6, 7]]
