from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from serving.request import DecodingOptions, FinishReason, Hypothesis
from serving.search import Advance, BeamSearch, Fork, make_lane_search
from tests.serving.search.reference import all_hypotheses, beam_search
from tests.serving.search.toy import EOS_ID, START_ID, Job, ToyLane, ToyModel, decode
from tests.support import score_of


@pytest.mark.parametrize("min_target_tokens", [0, 2], ids="min{}".format)
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0], ids="penalty{}".format)
@pytest.mark.parametrize("seed", range(5), ids="seed{}".format)
def test_a_beam_as_wide_as_all_prefixes_is_brute_force(seed: int, length_penalty: float, min_target_tokens: int) -> None:
    # Four words and three tokens: 1 + 3 + 9 sequences that end, 27 that do not.
    options = DecodingOptions(
        beam_size=40,
        num_hypotheses=40,
        length_penalty=length_penalty,
        min_target_tokens=min_target_tokens,
        max_target_tokens=3,
    )
    model = ToyModel(seed, vocabulary=4)
    expected = all_hypotheses(model, options)
    assert len(expected) == (40 if min_target_tokens == 0 else 36)
    assert list(decode(Job(name=0, model=model, options=options), vocabulary=4)) == expected


@pytest.mark.parametrize("seed", range(400), ids="seed{}".format)
def test_it_agrees_with_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = rng.choice([2, 3, 4, 6, 12, 30])
    beam_size = rng.randint(2, 6)
    max_target_tokens = rng.randint(1, 12)
    options = DecodingOptions(
        beam_size=beam_size,
        num_hypotheses=rng.randint(1, beam_size),
        length_penalty=rng.choice([-0.5, 0.0, 0.6, 1.0, 1.7, 3.0]),
        min_target_tokens=rng.choice([0, 0, rng.randint(0, 14)]),
        max_target_tokens=max_target_tokens,
    )
    impossible_ids = (0,) if vocabulary > 3 and rng.random() < 0.3 else ()
    model = ToyModel(seed, vocabulary, eos_bias=rng.uniform(-3.0, 3.0), impossible_ids=impossible_ids)

    hypotheses = decode(Job(name=0, model=model, options=options), vocabulary)

    assert list(hypotheses) == beam_search(model, options)
    if max_target_tokens <= 3 and vocabulary <= 6:
        assert len(hypotheses) == min(options.num_hypotheses, len(all_hypotheses(model, options)))
    elif vocabulary > 3:
        assert len(hypotheses) == options.num_hypotheses


def test_scores_and_reasons() -> None:
    log_probs = ToyModel(11, vocabulary=5).log_probs
    options = DecodingOptions(beam_size=3, num_hypotheses=3, length_penalty=0.6, max_target_tokens=4)
    hypotheses = decode(Job(name=0, model=ToyModel(11, vocabulary=5), options=options), vocabulary=5)
    reasons = set()
    for hypothesis in hypotheses:
        ended = hypothesis.finish_reason is FinishReason.EOS
        ids = (*hypothesis.target_ids, EOS_ID) if ended else hypothesis.target_ids
        assert EOS_ID not in hypothesis.target_ids
        assert hypothesis.target_tokens == len(ids)
        total = sum(log_probs(ids[:at])[ids[at]] for at in range(len(ids)))
        assert hypothesis.score == pytest.approx(total / len(ids) ** 0.6, rel=1e-12)
        reasons.add(hypothesis.finish_reason)
    assert reasons == {FinishReason.EOS, FinishReason.LENGTH}
    scores = [score_of(h) for h in hypotheses]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("min_target_tokens", [0, 4])
def test_what_is_cut_may_have_an_end_at_no_cost(min_target_tokens: int) -> None:
    log_probs = ToyModel(11, vocabulary=5).log_probs
    options = DecodingOptions(
        beam_size=3,
        num_hypotheses=3,
        length_penalty=0.6,
        min_target_tokens=min_target_tokens,
        max_target_tokens=4,
        ends_when_cut=True,
    )
    hypotheses = decode(Job(name=0, model=ToyModel(11, vocabulary=5), options=options), vocabulary=5)
    assert len(hypotheses) == 3
    reasons = set()
    for hypothesis in hypotheses:
        was_cut = hypothesis.finish_reason is FinishReason.LENGTH
        ids = (*hypothesis.target_ids, EOS_ID)
        assert hypothesis.target_tokens == len(ids)
        assert was_cut == (len(ids) == 4)
        total = sum(log_probs(ids[:at])[ids[at]] for at in range(len(ids) - was_cut))
        assert hypothesis.score == pytest.approx(total / len(ids) ** 0.6, rel=1e-12)
        reasons.add(hypothesis.finish_reason)
    assert reasons == ({FinishReason.LENGTH} if min_target_tokens else {FinishReason.EOS, FinishReason.LENGTH})


@pytest.mark.parametrize("seed", range(30))
def test_early_stopping_of_generate_waits_for_a_full_beam_without_a_length_penalty_too(seed: int) -> None:
    model = ToyModel(seed, vocabulary=12, eos_bias=2.0)
    options = DecodingOptions(beam_size=4, early_stopping=True, max_target_tokens=9, length_penalty=0.0)
    one, other = (
        decode(Job(name=0, model=model, options=replace(options, rules_of_generate=True, length_penalty=penalty)), 12)
        for penalty in (0.0, 1e-9)
    )
    assert [h.target_ids for h in one] == [h.target_ids for h in other]


class _Script:
    """A lane of width 4 with one source, given the few candidates that matter; the others have no probability."""

    THE, A, X, Y, BLACK, RED, DOG, CAT, THAT, RUNS, SITS, IS = range(2, 14)

    def __init__(self, num_slots: int = 1, slot: int = 0) -> None:
        self.search = make_lane_search(4, num_slots, EOS_ID, START_ID)
        self.slot = slot
        for at in range(slot + 1):
            self.search.add(at, DecodingOptions(beam_size=4, num_hypotheses=4, max_target_tokens=8))

    def step(self, *rows: dict[int, float]) -> Advance:
        """Each row's candidates, best first."""
        ids = np.full((self.slot + 1, 4, 9), 99, np.int64)
        log_probs = np.full((self.slot + 1, 4, 9), -np.inf, np.float32)
        for row, candidates in enumerate(rows):
            ids[:, row, : len(candidates)] = list(candidates)
            log_probs[:, row, : len(candidates)] = list(candidates.values())
        return self.search.advance(self.slot + 1, ids, log_probs)

    def tokens(self) -> list[list[int]]:
        return self.search.decoded(self.slot)


def test_the_worked_example() -> None:
    s = _Script()
    # The first step runs beam 0 alone, whatever the others say; its children share all that is cached.
    first = s.step({s.THE: -0.1, s.X: -0.2, s.A: -0.3, s.Y: -0.4}, {s.RED: 0.0})
    assert first == Advance([], [])
    assert s.tokens() == [[s.THE], [s.X], [s.A], [s.Y]]

    second = s.step({s.BLACK: -0.1, s.RED: -0.2, s.DOG: -0.4}, {}, {s.DOG: -0.1})
    assert second == Advance([], [Fork(0, 1, 1, 2), Fork(0, 3, 1, 2)])
    assert s.tokens() == [[s.THE, s.BLACK], [s.THE, s.RED], [s.A, s.DOG], [s.THE, s.DOG]]

    third = s.step({s.DOG: -0.1, s.CAT: -0.2}, {}, {s.THAT: -0.1}, {s.THAT: -0.1})
    assert third == Advance([], [Fork(0, 1, 2, 3)])
    assert s.tokens() == [
        [s.THE, s.BLACK, s.DOG],
        [s.THE, s.BLACK, s.CAT],
        [s.A, s.DOG, s.THAT],
        [s.THE, s.DOG, s.THAT],
    ]

    fourth = s.step({s.RUNS: -0.1, s.SITS: -0.5, s.IS: -0.6}, {}, {s.IS: -0.1}, {})
    assert fourth == Advance([], [Fork(0, 1, 3, 4), Fork(0, 3, 2, 4)])
    assert s.tokens() == [
        [s.THE, s.BLACK, s.DOG, s.RUNS],
        [s.THE, s.BLACK, s.DOG, s.SITS],
        [s.A, s.DOG, s.THAT, s.IS],
        [s.THE, s.BLACK, s.DOG, s.IS],
    ]
    assert s.search.next_ids.tolist() == [[s.RUNS, s.SITS, s.IS, s.IS]]
    assert s.search.num_tokens.tolist() == [[4, 4, 4, 4]]


def test_a_fork_names_rows_of_the_lane() -> None:
    s = _Script(num_slots=3, slot=2)
    s.step({s.THE: -0.1, s.X: -0.2, s.A: -0.3, s.Y: -0.4})
    forks = s.step({s.BLACK: -0.1, s.RED: -0.2}, {s.DOG: -0.1}, {s.DOG: -0.1}).forks
    assert forks == [Fork(0, 3, 1, 2), Fork(4, 7, 1, 2), Fork(8, 11, 1, 2)]


def test_no_fork_where_each_hypothesis_has_one_child() -> None:
    s = _Script()
    s.step({s.THE: -0.1, s.X: -0.2, s.A: -0.3, s.Y: -0.4})
    assert s.step({s.DOG: -0.1}, {s.DOG: -3.0}, {s.CAT: -0.1}, {s.CAT: -0.1}).forks == []
    # Row is not rank: the second best of the step stays in row 2.
    assert s.tokens() == [[s.THE, s.DOG], [s.X, s.DOG], [s.A, s.CAT], [s.Y, s.CAT]]


def test_among_equals_the_lower_row_then_the_earlier_candidate_is_first() -> None:
    s = _Script()
    s.step({s.THE: -0.5, s.X: -0.5, s.A: -0.5, s.Y: -0.5, s.RED: -0.5})
    assert s.tokens() == [[s.THE], [s.X], [s.A], [s.Y]]
    s.step({s.DOG: -0.5}, {s.CAT: -0.5, s.DOG: -0.5}, {s.CAT: -0.5}, {s.CAT: -0.5})
    assert s.tokens() == [[s.THE, s.DOG], [s.X, s.CAT], [s.A, s.CAT], [s.X, s.DOG]]


def test_an_end_below_the_best_w_is_not_kept() -> None:
    s = _Script()
    s.step({s.THE: -0.1, s.X: -0.2, EOS_ID: -0.3, s.A: -0.4, s.Y: -0.5})
    # Ends of rank 0 and 3 are kept, that of rank 4 is not; neither runs on.
    s.step({EOS_ID: 0.0, s.DOG: -0.05}, {s.CAT: 0.0, EOS_ID: -0.1, s.RED: -0.15}, {}, {s.DOG: -1.0})
    assert s.tokens() == [[s.THE, s.DOG], [s.X, s.CAT], [s.X, s.RED], [s.Y, s.DOG]]
    assert s.step({s.DOG: -9.0}).finished == []
    assert s.step({EOS_ID: -9.0}).finished == [0]
    kept = s.search.hypotheses(0)
    assert [h.target_ids for h in kept] == [(s.THE,), (s.X,), (), (s.THE, s.DOG, s.DOG)]
    assert [h.target_tokens for h in kept] == [2, 2, 1, 4]


@pytest.mark.parametrize(
    ("running", "finished"),
    [pytest.param(-1.99, [], id="better"), pytest.param(-2.0, [0], id="equal"), pytest.param(-2.01, [0], id="worse")],
)
def test_it_is_done_when_the_best_running_is_not_better_than_the_worst_kept(running: float, finished: list[int]) -> None:
    search = make_lane_search(2, 1, EOS_ID, START_ID)
    search.add(0, DecodingOptions(beam_size=2, length_penalty=1.0))
    ids = np.array([[[EOS_ID, 2, 3, 4, 5]] * 2], np.int64)
    none = [-np.inf] * 5
    assert search.advance(1, ids, np.array([[[-0.5, -0.5, -0.75, -8, -8], none]], np.float32)).finished == []
    # The second end scores -2.0 / 2 a token; the best that runs has the same two tokens.
    log_probs = np.array([[[-1.5, running + 0.5, -8, -8, -8], none]], np.float32)
    if running > -2.0:
        ids[0, 0, :2] = ids[0, 0, 1::-1]
        log_probs[0, 0, :2] = log_probs[0, 0, 1::-1]
    assert search.advance(1, ids, log_probs).finished == finished


def test_a_later_better_end_displaces_the_worst_kept() -> None:
    search = make_lane_search(2, 1, EOS_ID, START_ID)
    search.add(0, DecodingOptions(beam_size=2, num_hypotheses=2, length_penalty=1.0))
    none = [-np.inf] * 3
    ids = np.array([[[2, EOS_ID, 3]] * 2], np.int64)
    search.advance(1, ids, np.array([[[-0.1, -2.0, -3.0], none]], np.float32))
    search.advance(1, ids, np.array([[[-0.1, -1.0, -3.0], none]], np.float32))
    assert search.advance(1, ids, np.array([[[-0.1, -0.3, -3.0], none]], np.float32)).finished == []
    assert search.advance(1, ids, np.array([[[-5.0, -0.3, -6.0], none]], np.float32)).finished == [0]
    assert [h.target_ids for h in search.hypotheses(0)] == [(2, 2, 2), (2, 2)]


def test_every_prefix_ends_at_the_limit() -> None:
    options = DecodingOptions(beam_size=3, num_hypotheses=3, max_target_tokens=2)
    model = ToyModel(3, vocabulary=9, eos_bias=-50.0)
    hypotheses = decode(Job(name=0, model=model, options=options), vocabulary=9)
    assert [(h.finish_reason, h.target_tokens, len(h.target_ids)) for h in hypotheses] == [(FinishReason.LENGTH, 2, 2)] * 3


def test_a_source_with_no_possible_continuation_is_done_with_what_it_has() -> None:
    s = _Script()
    s.step({s.THE: -0.1, EOS_ID: -0.2})
    assert s.step({}).finished == [0]
    assert s.search.hypotheses(0) == (
        Hypothesis(target_ids=(), score=float(np.float32(-0.2)), finish_reason=FinishReason.EOS, target_tokens=1),
    )


def test_a_row_that_is_not_a_number_goes_no_further() -> None:
    s = _Script()
    s.step({s.THE: -0.1, s.A: -0.2})
    s.step({s.DOG: float("nan")}, {s.CAT: -0.1})
    assert s.step({s.DOG: float("nan")}, {EOS_ID: -0.5}).finished == [0]
    assert [h.target_ids for h in s.search.hypotheses(0)] == [(s.A, s.CAT)]


def test_what_all_hypotheses_have_in_common_is_decided() -> None:
    s = _Script()
    s.step({s.THE: -0.1, s.A: -0.2})
    assert s.search.decided(0) == []
    # Both that run go on from "the".
    s.step({s.DOG: -0.1, s.CAT: -0.2})
    assert s.search.decided(0) == [s.THE]
    # "the cat" ended, which may stay the best: "the dog" is not decided though all that runs has it.
    s.step({s.RUNS: -0.4}, {EOS_ID: -0.3})
    assert s.tokens()[0] == [s.THE, s.DOG, s.RUNS]
    assert s.search.decided(0) == [s.THE]


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("width", [2, 3, 5])
def test_what_is_decided_stays_and_is_what_the_best_hypothesis_starts_with(width: int, early_stopping: bool) -> None:
    lengths = set()
    for seed in range(40):
        lane = ToyLane(width, 2, vocabulary=9)
        options = DecodingOptions(beam_size=width, max_target_tokens=12, early_stopping=early_stopping)
        for name in range(2):
            lane.add(Job(name=name, model=ToyModel(2 * seed + name, 9, eos_bias=-1.0), options=options))
        lane.run()
        for name, steps in lane.decided.items():
            final = lane.hypotheses[name][0].target_ids
            assert [len(decided) for decided in steps] == sorted(len(decided) for decided in steps)
            assert all(final[: len(decided)] == decided for decided in steps)
            lengths |= {len(decided) for decided in steps}
    assert max(lengths) > 3


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("hidden", [0, 2])
def test_token_scores_are_the_models_and_make_up_the_score(width: int, hidden: int) -> None:
    lane = ToyLane(width, 3, vocabulary=9)
    for name in range(3):
        options = DecodingOptions(
            beam_size=width,
            num_hypotheses=width,
            max_target_tokens=9,
            # Only the last one's are wanted, which joins a lane whose sums nobody has kept so far.
            return_token_scores=name == 2,
            target_prefix=(4, 5) if name == 2 and hidden else (),
            hidden_prefix_tokens=hidden if name == 2 else 0,
        )
        model = ToyModel(name, 9, eos_bias=-1.0)
        if name == 2:
            lane.step()
        lane.add(Job(name=name, model=model, options=options))
    lane.run()
    assert [hypothesis.token_scores for name in (0, 1) for hypothesis in lane.hypotheses[name]] == [None] * (2 * width)
    for hypothesis in lane.hypotheses[2]:
        before = (4, 5) if hidden else ()
        ids = (*hypothesis.target_ids, *((EOS_ID,) if hypothesis.finish_reason is FinishReason.EOS else ()))
        expected = [model.log_probs((*before, *ids[:i]))[token] for i, token in enumerate(ids)]
        assert hypothesis.token_scores == pytest.approx(expected, abs=1e-5)
        assert hypothesis.score == pytest.approx(
            sum(hypothesis.token_scores or ()) / (hypothesis.target_tokens + hidden), abs=1e-6
        )


def test_it_asks_for_enough_candidates() -> None:
    search = make_lane_search(4, 2, EOS_ID, START_ID)
    assert isinstance(search, BeamSearch)
    assert (search.width, search.num_candidates) == (4, 9)
    assert search.next_ids.tolist() == [[START_ID] * 4] * 2


def test_forks_do_happen_in_the_toy_lane() -> None:
    lane = ToyLane(4, 1, vocabulary=12)
    lane.add(Job(name=0, model=ToyModel(0, 12, eos_bias=-50.0), options=DecodingOptions(beam_size=4, max_target_tokens=12)))
    starts = set()
    while lane.jobs:
        lane.step()
        starts |= {fork.start for fork in lane.forks}
    assert len(starts) > 3


def test_with_early_stopping_no_more_hypotheses_are_kept_than_are_returned() -> None:
    # Without a length penalty it goes on until a hypothesis ends as the best of its step: here that is never so.
    search = make_lane_search(2, 1, EOS_ID, START_ID)
    assert isinstance(search, BeamSearch)
    options = DecodingOptions(beam_size=2, num_hypotheses=2, length_penalty=0.0, early_stopping=True, max_target_tokens=40)
    search.add(0, options)
    ids = np.full((1, 2, 5), 9, np.int64)
    ids[0, :, :3] = [5, EOS_ID, 6]
    log_probs = np.full((1, 2, 5), -np.inf, np.float32)
    log_probs[0, :, :3] = [-0.1, -0.2, -3.0]
    steps = 0
    while not search.advance(1, ids.copy(), log_probs.copy()).finished:
        steps += 1
        assert len(search._sources[0].kept) <= 2
    assert steps == 39
    assert [hypothesis.target_tokens for hypothesis in search.hypotheses(0)] == [1, 2]
