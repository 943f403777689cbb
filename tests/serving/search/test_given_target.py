"""Targets that are given: nothing is searched for, the model says how probable each token is."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from serving.request import DecodingOptions, FinishReason
from serving.search import make_lane_search
from tests.serving.search.toy import EOS_ID, START_ID, Job, ToyLane, ToyModel, decode

VOCABULARY = 9


def given(*tokens: int, prefix: tuple[int, ...] = ()) -> DecodingOptions:
    """As a target of these tokens and an end is scored, after a prefix that is the model's own."""
    return DecodingOptions(
        length_penalty=0.0,
        max_target_tokens=len(prefix) + len(tokens) + 1,
        return_token_scores=True,
        target_prefix=prefix,
        hidden_prefix_tokens=len(prefix),
        given_target=(*tokens, EOS_ID),
    )


@pytest.mark.parametrize("prefix", [(), (8,), (8, 2)], ids="prefix{}".format)
@pytest.mark.parametrize("target", [(), (5,), (0, 5, 5, 3, 7)], ids="target{}".format)
def test_each_token_has_the_models_log_probability(target: tuple[int, ...], prefix: tuple[int, ...]) -> None:
    model = ToyModel(3, VOCABULARY)
    (hypothesis,) = decode(Job(name=0, model=model, options=given(*target, prefix=prefix)), VOCABULARY)
    whole = (*prefix, *target, EOS_ID)
    log_probs = [model.log_probs(whole[:place])[token] for place, token in enumerate(whole)][len(prefix) :]
    assert hypothesis.token_scores == pytest.approx(log_probs, rel=1e-6)
    assert hypothesis.score == pytest.approx(sum(log_probs), rel=1e-6)
    assert (hypothesis.target_ids, hypothesis.target_tokens) == (target, len(target) + 1)
    assert hypothesis.finish_reason is FinishReason.EOS


@pytest.mark.parametrize("seed", range(20), ids="seed{}".format)
def test_what_was_decoded_is_scored_as_it_was_then(seed: int) -> None:
    """The most probable token has exactly the log-probability of the candidate."""
    model = ToyModel(seed, VOCABULARY, eos_bias=1.0)
    decoding = DecodingOptions(length_penalty=0.0, max_target_tokens=40, return_token_scores=True)
    (decoded,) = decode(Job(name=0, model=model, options=decoding), VOCABULARY)
    assert decoded.finish_reason is FinishReason.EOS
    assert decode(Job(name=0, model=model, options=given(*decoded.target_ids)), VOCABULARY) == (decoded,)


def test_neighbours_of_any_kind_change_no_bit() -> None:
    rng = random.Random(5)
    jobs = []
    for name in range(30):
        target = [rng.choice([0, *range(2, VOCABULARY)]) for _ in range(rng.randrange(8))]
        options = rng.choice(
            [
                given(*target),
                given(*target, prefix=(4,)),
                DecodingOptions(max_target_tokens=9),
                DecodingOptions(suppressed=((5,),)),
            ]
        )
        options = replace(options, max_target_tokens=min(options.max_target_tokens, 12))
        jobs.append(Job(name=name, model=ToyModel(name, VOCABULARY), options=options))
    alone = {job.name: decode(job, VOCABULARY) for job in jobs}
    lane = ToyLane(1, num_slots=5, vocabulary=VOCABULARY, rng=rng)
    waiting = list(jobs)
    while waiting or lane.jobs:
        while waiting and len(lane.jobs) < lane.num_slots:
            lane.add(waiting.pop())
        lane.step()
    assert lane.hypotheses == alone


def test_log_probabilities_are_those_of_the_whole_vocabulary_without_any_rule() -> None:
    search = make_lane_search(1, 1, EOS_ID, START_ID)
    search.add(0, given(6))
    assert search.needs_log_probs
    assert search.needs_logits
    logits = np.array([[[0.5, -40.0, 3.0, 0.0, 2.0, -1.0, -12.5, 1.0, 0.0]]], np.float32)
    exact = logits[0, 0].astype(np.float64)
    exact -= np.log(np.exp(exact).sum())

    def advance() -> list[int]:
        candidates = np.array([[[2, 4]]]), exact[None, None, [2, 4]].astype(np.float32)
        return search.advance(1, *candidates, logits).finished

    assert advance() == []
    assert search.next_ids.tolist() == [[6]]
    # However unlikely it is.
    assert advance() == [0]
    (hypothesis,) = search.hypotheses(0)
    assert hypothesis.token_scores == pytest.approx([exact[6], exact[EOS_ID]], abs=1e-5)


def test_it_leaves_with_its_source() -> None:
    search = make_lane_search(1, 2, EOS_ID, START_ID)
    search.add(0, DecodingOptions())
    search.add(1, given(5))
    assert search.needs_logits
    search.leave(0)
    search.move(1, 0)
    assert search.needs_logits
    search.leave(0)
    search.add(0, DecodingOptions())
    assert not search.needs_logits


def test_probabilities_that_are_no_numbers_come_to_nothing() -> None:
    search = make_lane_search(1, 1, EOS_ID, START_ID)
    search.add(0, given())
    candidates = np.array([[[2, 4]]]), np.full((1, 1, 2), np.nan, np.float32)
    assert search.advance(1, *candidates, np.full((1, 1, VOCABULARY), np.nan, np.float32)).finished == [0]
    assert search.hypotheses(0) == ()


def test_there_is_one_hypothesis_of_a_target_that_is_given() -> None:
    search = make_lane_search(2, 1, EOS_ID, START_ID)
    with pytest.raises(AssertionError, match="one hypothesis"):
        search.add(0, replace(given(5), beam_size=2))
