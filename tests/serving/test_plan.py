from __future__ import annotations

import math
from dataclasses import replace

import pytest

from serving.plan import Plan, make_plan
from serving.request import Alternatives, DecodingOptions, FinishReason, Hypothesis, Outcome, Sampling, SequenceTimings
from tests.serving.search.toy import EOS_ID, Job, ToyModel, decode

_VOCABULARY = 8
_MODEL = ToyModel(5, _VOCABULARY, eos_bias=-0.5)


def _run(plan: Plan) -> Outcome:
    """As an engine would that decodes with the toy model."""
    while wanted := plan.wanted():
        plan.take([Outcome(hypotheses=decode(Job(name=0, model=_MODEL, options=of_one), _VOCABULARY)) for of_one in wanted])
    return plan.outcome()


def _log_prob(ids: tuple[int, ...], start: int) -> float:
    return sum(_MODEL.log_probs(ids[:i])[ids[i]] for i in range(start, len(ids)))


def _whole(hypothesis: Hypothesis) -> tuple[int, ...]:
    return (*hypothesis.target_ids, *((EOS_ID,) if hypothesis.finish_reason is FinishReason.EOS else ()))


def test_one_sequence_is_decoded_as_it_is_asked_for() -> None:
    options = DecodingOptions(beam_size=3, num_hypotheses=2, max_target_tokens=6)
    plan = make_plan(options)
    assert plan.wanted() == [options]
    assert _run(plan).hypotheses == decode(Job(name=0, model=_MODEL, options=options), _VOCABULARY)


def test_an_alternative_is_no_token_that_targets_do_not_start_with_but_what_follows_may_be() -> None:
    best, *_ = sorted(
        (token for token in range(_VOCABULARY) if token != EOS_ID), key=lambda token: -_MODEL.log_probs((4,))[token]
    )
    options = DecodingOptions(num_hypotheses=3, max_target_tokens=7, target_prefix=(4,), suppressed_first=(best,))
    plan = make_plan(options, Alternatives())
    (first,) = plan.wanted()
    assert first.suppressed_first == (best,)
    plan.take([Outcome(hypotheses=decode(Job(name=0, model=_MODEL, options=first), _VOCABULARY))])
    assert best not in {of_one.target_prefix[1] for of_one in plan.wanted()}
    assert [of_one.suppressed_first for of_one in plan.wanted()] == [(), (), ()]


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("prefix", [(), (4,), (4, 6)], ids=str)
def test_alternatives_go_on_from_the_most_probable_tokens_after_the_prefix(prefix: tuple[int, ...], beam_size: int) -> None:
    options = DecodingOptions(
        beam_size=beam_size,
        num_hypotheses=4,
        max_target_tokens=7,
        target_prefix=prefix,
        return_token_scores=True,
        length_penalty=0.7,
    )
    hypotheses = _run(make_plan(options, Alternatives())).hypotheses

    log_probs = _MODEL.log_probs(prefix)
    best = sorted((token for token in range(_VOCABULARY) if token != EOS_ID), key=lambda token: -log_probs[token])[:4]
    assert [hypothesis.target_ids[: len(prefix) + 1] for hypothesis in hypotheses] == [(*prefix, token) for token in best]
    for hypothesis in hypotheses:
        ids = _whole(hypothesis)
        forced = DecodingOptions(
            beam_size=beam_size, max_target_tokens=7, target_prefix=ids[: len(prefix) + 1], length_penalty=0.7
        )
        assert decode(Job(name=0, model=_MODEL, options=forced), _VOCABULARY)[0].target_ids == hypothesis.target_ids
        assert hypothesis.score == pytest.approx(_log_prob(ids, len(prefix)) / len(ids) ** 0.7, abs=1e-5)
        expected = [_MODEL.log_probs(ids[:i])[ids[i]] if i >= len(prefix) else 0.0 for i in range(len(ids))]
        assert hypothesis.token_scores == pytest.approx(expected, abs=1e-5)


def test_a_models_own_prefix_is_part_of_no_alternative() -> None:
    options = DecodingOptions(num_hypotheses=2, max_target_tokens=6, target_prefix=(3, 4), hidden_prefix_tokens=1)
    first, second = _run(make_plan(options, Alternatives())).hypotheses
    log_probs = _MODEL.log_probs((3, 4))
    assert first.target_ids[0] == second.target_ids[0] == 4
    assert log_probs[first.target_ids[1]] > log_probs[second.target_ids[1]]
    assert first.score == pytest.approx(_log_prob((3, *_whole(first)), 2) / (len(_whole(first)) + 1), abs=1e-5)


def test_improbable_alternatives_are_left_out_and_scores_that_nobody_wants() -> None:
    log_probs = sorted((log_prob for token, log_prob in enumerate(_MODEL.log_probs(())) if token != EOS_ID), reverse=True)
    least = math.exp((log_probs[1] + log_probs[2]) / 2)
    options = DecodingOptions(num_hypotheses=4, max_target_tokens=5, return_scores=False)
    hypotheses = _run(make_plan(options, Alternatives(min_probability=least))).hypotheses
    assert len(hypotheses) == 2
    assert [hypothesis.score for hypothesis in hypotheses] == [None, None]
    # The most probable one is there whatever it is.
    assert len(_run(make_plan(options, Alternatives(min_probability=1.0))).hypotheses) == 1


def test_an_alternative_at_the_last_position_is_one_token() -> None:
    options = DecodingOptions(num_hypotheses=3, max_target_tokens=2, target_prefix=(4,))
    for hypothesis in _run(make_plan(options, Alternatives())).hypotheses:
        assert (len(hypothesis.target_ids), hypothesis.finish_reason) == (2, FinishReason.LENGTH)
        assert hypothesis.score == pytest.approx(_MODEL.log_probs((4,))[hypothesis.target_ids[1]] / 2, abs=1e-6)


def test_draws_differ_in_their_number_alone_and_the_best_is_first() -> None:
    options = DecodingOptions(num_hypotheses=3, sampling=Sampling(seed=7, top_k=5), return_scores=False)
    plan = make_plan(options)
    wanted = plan.wanted()
    assert [(of_one.num_hypotheses, of_one.return_scores) for of_one in wanted] == [(1, True)] * 3
    assert [(of_one.sampling, of_one.draw) for of_one in wanted] == [(Sampling(seed=7, top_k=5), draw) for draw in range(3)]
    timings = [
        SequenceTimings(queue_s=1.0, steps=1, mean_rows_per_step=4.0),
        SequenceTimings(encode_s=2.0, steps=3, mean_rows_per_step=8.0),
        SequenceTimings(decode_s=3.0),
    ]
    drawn = [
        Hypothesis(target_ids=(i,), score=score, finish_reason=FinishReason.EOS, target_tokens=2)
        for i, score in enumerate((-2.0, -1.0, -3.0))
    ]
    plan.take([Outcome(hypotheses=(one,), timings=of_one) for one, of_one in zip(drawn, timings, strict=True)])
    assert plan.wanted() == []
    outcome = plan.outcome()
    assert [hypothesis.target_ids for hypothesis in outcome.hypotheses] == [(1,), (0,), (2,)]
    assert {hypothesis.score for hypothesis in outcome.hypotheses} == {None}
    assert outcome.timings == SequenceTimings(queue_s=1.0, encode_s=2.0, decode_s=3.0, steps=4, mean_rows_per_step=7.0)


def test_rounds_take_their_times_one_after_the_other() -> None:
    plan = make_plan(DecodingOptions(num_hypotheses=2, max_target_tokens=4), Alternatives())

    def told(token: int, **timings: float) -> Outcome:
        hypothesis = Hypothesis(target_ids=(token,), score=-1.0, finish_reason=FinishReason.LENGTH, target_tokens=1)
        return Outcome(hypotheses=(hypothesis, hypothesis), timings=SequenceTimings(steps=2, mean_rows_per_step=3.0, **timings))

    plan.take([told(4, queue_s=1.0, decode_s=2.0)])
    plan.take([told(4, queue_s=0.5, decode_s=1.0), told(5, encode_s=0.25, decode_s=4.0)])
    assert plan.outcome().timings == SequenceTimings(queue_s=1.5, encode_s=0.25, decode_s=6.0, steps=6, mean_rows_per_step=3.0)


def test_the_coverage_penalty_has_no_part_in_how_probable_an_alternative_is() -> None:
    options = DecodingOptions(num_hypotheses=4, max_target_tokens=6, return_token_scores=True, beam_size=2, target_prefix=(4,))
    plain = _run(make_plan(options, Alternatives())).hypotheses
    penalized = _run(make_plan(replace(options, coverage_penalty=5.0), Alternatives())).hypotheses
    assert [hypothesis.target_ids[1] for hypothesis in penalized] == [hypothesis.target_ids[1] for hypothesis in plain]
    for hypothesis in penalized:
        assert hypothesis.token_scores is not None
        assert hypothesis.token_scores[1] == pytest.approx(_MODEL.log_probs((4,))[hypothesis.target_ids[1]], abs=1e-6)


def test_a_penalty_of_each_token_has_no_part_in_how_probable_an_alternative_is_and_is_taken_once() -> None:
    options = DecodingOptions(
        num_hypotheses=3, max_target_tokens=6, return_token_scores=True, target_prefix=(4,), word_penalty=0.5
    )
    for hypothesis in _run(make_plan(options, Alternatives())).hypotheses:
        assert hypothesis.token_scores is not None
        assert hypothesis.token_scores[1] == pytest.approx(_MODEL.log_probs((4,))[hypothesis.target_ids[1]], abs=1e-6)
        length = hypothesis.target_tokens
        assert hypothesis.score == pytest.approx((sum(hypothesis.token_scores) - 0.5 * length) / length, abs=1e-6)


@pytest.mark.parametrize("prefix", [(), (4,), (4, 5)], ids=str)
def test_alternatives_of_a_model_that_ends_what_is_cut_are_tokens_all_the_same(prefix: tuple[int, ...]) -> None:
    options = DecodingOptions(num_hypotheses=3, max_target_tokens=3, ends_when_cut=True, target_prefix=prefix)
    hypotheses = _run(make_plan(options, Alternatives())).hypotheses
    assert len({hypothesis.target_ids[len(prefix)] for hypothesis in hypotheses}) == 3
    assert all(hypothesis.target_tokens <= 3 and EOS_ID not in hypothesis.target_ids for hypothesis in hypotheses)
