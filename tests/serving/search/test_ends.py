"""Tokens that end a hypothesis in the place of the end-of-sentence token, against searches that are written out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from serving.request import DecodingOptions, FinishReason, Hypothesis, Sampling
from serving.search import make_lane_search
from tests.serving.search.reference import beam_search, greedy_search
from tests.serving.search.toy import EOS_ID, START_ID, Job, ToyLane, ToyModel, decode
from tests.support import score_of


def check_same(found: tuple[Hypothesis, ...], expected: list[Hypothesis]) -> None:
    """The same but for rounding: scores of sources with rules are made of logits."""

    def parts(hypotheses: list[Hypothesis]) -> list[object]:
        return [(one.target_ids, one.finish_reason, one.target_tokens) for one in hypotheses]

    assert parts(list(found)) == parts(expected)
    assert [score_of(one) for one in found] == pytest.approx([score_of(one) for one in expected], abs=1e-6)


@pytest.mark.parametrize("seed", range(200), ids="seed{}".format)
def test_it_agrees_with_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = rng.choice([12, 15, 30])
    width = rng.randint(1, 5)
    ends = rng.sample([token for token in range(vocabulary) if token != EOS_ID], rng.randint(1, vocabulary - 2 - width))
    ends += [EOS_ID] * rng.choice([0, 1])
    options = DecodingOptions(
        beam_size=width,
        num_hypotheses=rng.randint(1, width),
        length_penalty=rng.choice([0.0, 0.6, 1.0, 2.0]),
        min_target_tokens=rng.choice([0, 0, 2, 4]),
        max_target_tokens=rng.randint(1, 10),
        end_ids=tuple(ends),
        return_end_token=rng.random() < 0.5,
    )
    model = ToyModel(seed, vocabulary, eos_bias=rng.uniform(-2.0, 2.0))
    found = decode(Job(name=0, model=model, options=options), vocabulary)
    check_same(found, (greedy_search if width == 1 else beam_search)(model, options))
    assert len(found) == options.num_hypotheses


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("returned", [False, True])
def test_an_end_is_part_of_the_answer_where_it_was_asked_for(width: int, returned: bool) -> None:
    model = ToyModel(3, 12, eos_bias=-50.0)
    options = DecodingOptions(beam_size=width, max_target_tokens=20, end_ids=(4, 5, 6), return_end_token=returned)
    (best,) = decode(Job(name=0, model=model, options=options), 12)
    assert best.finish_reason is FinishReason.EOS
    assert best.target_tokens == len(best.target_ids) + (not returned)
    assert {4, 5, 6}.isdisjoint(best.target_ids[: -1 if returned else None])


@pytest.mark.parametrize("width", [1, 3])
def test_the_end_of_sentence_token_is_one_like_any_other_where_it_is_not_among_the_ends(width: int) -> None:
    model = ToyModel(3, 12, eos_bias=2.0)
    asked = DecodingOptions(beam_size=width, max_target_tokens=12, end_ids=(4,), return_token_scores=True)
    (best,) = decode(Job(name=0, model=model, options=asked), 12)
    assert EOS_ID in best.target_ids
    assert best.target_tokens > best.target_ids.index(EOS_ID) + 1
    assert best.token_scores is not None
    assert sum(best.token_scores) / best.target_tokens == pytest.approx(score_of(best))
    both = replace(asked, end_ids=(4, EOS_ID))
    (first,) = decode(Job(name=0, model=model, options=both), 12)
    assert EOS_ID not in first.target_ids


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("returned", [False, True])
def test_what_is_cut_has_the_end_of_sentence_token_whatever_ends_it(width: int, returned: bool) -> None:
    model = ToyModel(3, 12, eos_bias=-50.0)
    options = DecodingOptions(
        beam_size=width, max_target_tokens=5, end_ids=(4,), min_target_tokens=5, ends_when_cut=True, return_end_token=returned
    )
    (best,) = decode(Job(name=0, model=model, options=options), 12)
    assert (best.finish_reason, best.target_tokens, len(best.target_ids)) == (FinishReason.LENGTH, 5, 4)


@pytest.mark.parametrize("width", [1, 3])
def test_no_token_of_a_prefix_ends_a_hypothesis(width: int) -> None:
    model = ToyModel(5, 12)
    options = DecodingOptions(beam_size=width, max_target_tokens=9, target_prefix=(4, 7, 4), end_ids=(4,), min_target_tokens=5)
    (best,) = decode(Job(name=0, model=model, options=options), 12)
    assert best.target_ids[:3] == (4, 7, 4)
    assert 4 not in best.target_ids[3:]
    assert best.target_tokens >= 6


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("returned", [False, True])
def test_what_is_decided_is_what_the_best_hypothesis_starts_with(width: int, returned: bool) -> None:
    for seed in range(20):
        lane = ToyLane(width, 1, vocabulary=12)
        options = DecodingOptions(beam_size=width, max_target_tokens=12, end_ids=(4, 5), return_end_token=returned)
        lane.add(Job(name=0, model=ToyModel(seed, 12, eos_bias=-1.0), options=options))
        lane.run()
        final = lane.hypotheses[0][0].target_ids
        assert all(final[: len(decided)] == decided for decided in lane.decided.get(0, ()))


@pytest.mark.parametrize(
    ("early_stopping", "freely", "best", "kept"),
    [
        (True, False, 5, 0),
        (True, False, EOS_ID, 1),
        (True, True, 5, 1),
        (False, False, 5, 1),
        (False, False, EOS_ID, 1),
    ],
)
def test_right_after_a_prefix_only_the_best_continuation_of_an_early_stopping_beam_may_be_an_end(
    early_stopping: bool, freely: bool, best: int, kept: int
) -> None:
    search = make_lane_search(3, 1, EOS_ID, START_ID)
    options = DecodingOptions(
        beam_size=3,
        num_hypotheses=3,
        target_prefix=(9,),
        early_stopping=early_stopping,
        ends_freely_after_prefix=freely,
        max_target_tokens=3,
    )
    search.add(0, options)

    def advance(*ids: int) -> list[int]:
        log_probs = np.array([[[-0.1 - rank for rank in range(7)]] * 3], np.float32)
        return search.advance(1, np.array([[ids] * 3]), log_probs).finished

    after_prefix = (best, 5 if best == EOS_ID else EOS_ID, 6, 7, 8, 10, 11)
    assert advance(*after_prefix) == []
    assert advance(*after_prefix) == []
    assert sorted(search.next_ids[0].tolist()) == [5, 6, 7]
    assert advance(5, 6, 7, 8, 9, 10, 11) == [0]
    assert [one.target_ids for one in search.hypotheses(0)].count((9,)) == kept


def test_sources_without_further_ends_go_on_beside_those_that_have_some() -> None:
    search = make_lane_search(1, 2, EOS_ID, START_ID)
    search.add(0, DecodingOptions())
    search.add(1, DecodingOptions(end_ids=(6,)))
    logits = np.zeros((2, 1, 9), np.float32)
    logits[:, :, 6] = 5.0
    ids, log_probs = np.array([[[6, 7]], [[6, 7]]]), np.full((2, 1, 2), -1.0, np.float32)
    assert search.advance(2, ids, log_probs, logits).finished == [1]


def test_draws_have_their_shares_with_further_ends() -> None:
    logits = np.array([[[0.0, 1.0, 2.0, 2.0]]], np.float32)
    drawn: Counter[int] = Counter()
    for seed in range(2000):
        search = make_lane_search(1, 1, EOS_ID, START_ID)
        search.add(0, DecodingOptions(end_ids=(2, 3), return_end_token=True, sampling=Sampling(seed=seed)))
        search.advance(1, np.zeros((1, 1, 2), np.int64), np.zeros((1, 1, 2), np.float32), logits.copy())
        drawn[int(search.next_ids[0, 0])] += 1
    shares = np.exp(logits[0, 0]) / np.exp(logits).sum()
    # Five standard deviations.
    assert all(abs(drawn[token] / 2000 - share) <= 5 * (share * (1 - share) / 2000) ** 0.5 for token, share in enumerate(shares))
