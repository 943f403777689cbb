from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from serving.request import DecodingOptions, FinishReason, Hypothesis
from serving.search import Advance, GreedySearch, LaneSearch, make_lane_search
from tests.serving.search.reference import greedy_search
from tests.serving.search.toy import EOS_ID, START_ID, Job, ToyModel, decode


def _advance(search: LaneSearch[Any], *rows: tuple[int, float, int, float]) -> Advance:
    """A row: its best token and log-probability, its second best and that one's."""
    ids = np.array([[[first, second]] for first, _, second, _ in rows], np.int64)
    log_probs = np.array([[[first, second]] for _, first, _, second in rows], np.float32)
    return search.advance(len(rows), ids, log_probs)


def _search(*options: DecodingOptions) -> LaneSearch[Any]:
    search = make_lane_search(1, len(options), EOS_ID, START_ID)
    for slot, of_slot in enumerate(options):
        search.add(slot, of_slot)
    return search


def test_it_takes_the_best_token_until_the_end() -> None:
    search = _search(DecodingOptions(length_penalty=2.0))
    assert isinstance(search, GreedySearch)
    assert (search.width, search.num_candidates) == (1, 2)
    assert search.next_ids.tolist() == [[START_ID]]
    assert _advance(search, (5, -0.5, 6, -1.0)) == Advance([], [])
    assert search.next_ids.tolist() == [[5]]
    assert search.decided(0) == [5]
    assert _advance(search, (6, -0.25, 5, -1.0)) == Advance([], [])
    assert search.num_tokens.tolist() == [[2]]
    assert _advance(search, (EOS_ID, -0.75, 5, -1.0)) == Advance([0], [])
    assert search.decided(0) == [5, 6, EOS_ID]
    assert search.hypotheses(0) == (
        Hypothesis(target_ids=(5, 6), score=-1.5 / 9, finish_reason=FinishReason.EOS, target_tokens=3),
    )


def test_an_end_that_comes_too_early_is_passed_over() -> None:
    search = _search(DecodingOptions(min_target_tokens=1), DecodingOptions(), DecodingOptions(min_target_tokens=2))
    row = (EOS_ID, -0.5, 6, -1.0)
    assert _advance(search, row, row, row).finished == [1]
    assert _advance(search, row, row, row).finished == [0, 1]
    assert _advance(search, row, row, row).finished == [0, 1, 2]
    assert search.hypotheses(2) == (
        Hypothesis(target_ids=(6, 6), score=-2.5 / 3, finish_reason=FinishReason.EOS, target_tokens=3),
    )


@pytest.mark.parametrize(
    ("last", "reason", "target_ids"),
    [
        pytest.param(5, FinishReason.LENGTH, (5, 5), id="word"),
        pytest.param(EOS_ID, FinishReason.EOS, (5,), id="eos"),
    ],
)
def test_it_ends_at_the_limit(last: int, reason: FinishReason, target_ids: tuple[int, ...]) -> None:
    search = _search(DecodingOptions(max_target_tokens=2, length_penalty=0.0))
    assert _advance(search, (5, -0.5, 6, -1.0)).finished == []
    assert _advance(search, (last, -0.5, 6, -1.0)).finished == [0]
    assert search.hypotheses(0) == (Hypothesis(target_ids=target_ids, score=-1.0, finish_reason=reason, target_tokens=2),)


@pytest.mark.parametrize("min_target_tokens", [0, 5])
def test_what_is_cut_may_have_an_end_at_no_cost(min_target_tokens: int) -> None:
    options = DecodingOptions(max_target_tokens=2, min_target_tokens=min_target_tokens, length_penalty=0.0, ends_when_cut=True)
    search = _search(options, DecodingOptions(max_target_tokens=2, length_penalty=0.0))
    row = (5, -0.5, 6, -1.0)
    assert _advance(search, row, row).finished == []
    assert _advance(search, row, row).finished == [0, 1]
    cut = FinishReason.LENGTH
    assert search.hypotheses(0) == (Hypothesis(target_ids=(5,), score=-0.5, finish_reason=cut, target_tokens=2),)
    assert search.hypotheses(1) == (Hypothesis(target_ids=(5, 5), score=-1.0, finish_reason=cut, target_tokens=2),)
    # The option moves with its source.
    search.add(0, options)
    search.leave(1)
    search.move(0, 1)
    search.add(0, DecodingOptions())
    assert _advance(search, row, row).finished == []
    assert _advance(search, row, row).finished == [1]
    assert search.hypotheses(1)[0].target_ids == (5,)


def test_an_end_before_the_limit_is_the_models_own() -> None:
    search = _search(DecodingOptions(max_target_tokens=3, ends_when_cut=True))
    _advance(search, (5, -0.5, 6, -1.0))
    assert _advance(search, (EOS_ID, -0.5, 6, -1.0)).finished == [0]
    assert search.hypotheses(0)[0].finish_reason is FinishReason.EOS


def test_a_minimum_above_the_limit_leaves_the_limit() -> None:
    search = _search(DecodingOptions(min_target_tokens=5, max_target_tokens=1))
    assert _advance(search, (EOS_ID, -0.5, 6, -1.0)).finished == [0]
    assert search.hypotheses(0) == (Hypothesis(target_ids=(6,), score=-1.0, finish_reason=FinishReason.LENGTH, target_tokens=1),)


@pytest.mark.parametrize("seed", range(60), ids="seed{}".format)
def test_it_agrees_with_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = rng.choice([2, 3, 9])
    options = DecodingOptions(
        length_penalty=rng.choice([0.0, 0.6, 1.0, 2.0]),
        min_target_tokens=rng.choice([0, 3]),
        max_target_tokens=rng.randint(1, 12),
    )
    model = ToyModel(seed, vocabulary, eos_bias=rng.uniform(-2.0, 2.0))
    assert list(decode(Job(name=0, model=model, options=options), vocabulary)) == greedy_search(model, options)
