"""What options ask of single tokens, against the definitions written out."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.request import DecodingOptions, PrefixBias, Sampling
from serving.search import make_lane_search
from serving.search.rules import TokenRules
from tests.serving.search.toy import EOS_ID, START_ID
from tests.support import score_of

V = 12
LOGITS = np.random.default_rng(5).normal(0.0, 2.0, V).astype(np.float32)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - top - total for x in logits]


def log_probs(decoded: list[int], **options: object) -> list[float]:
    found: list[float] = TokenRules(DecodingOptions(**options), EOS_ID, START_ID).log_probs(LOGITS, decoded).tolist()  # type: ignore[arg-type]  # of tests
    return found


@pytest.mark.parametrize("beam_size", [1, 4])
def test_with_the_rules_of_generate_the_start_token_has_come_already(beam_size: int) -> None:
    start = 3
    options = DecodingOptions(beam_size=beam_size, repetition_penalty=1.5, rules_of_generate=True)
    found = TokenRules(options, EOS_ID, start).log_probs(LOGITS, [7])
    # Greedy search looks at logits, beams at what comes of them.
    scores = [float(x) for x in LOGITS] if beam_size == 1 else log_softmax([float(x) for x in LOGITS])
    for token in (start, 7):
        scores[token] = scores[token] / 1.5 if scores[token] >= 0 else scores[token] * 1.5
    assert found.tolist() == pytest.approx(log_softmax(scores) if beam_size == 1 else scores)


def test_with_the_rules_of_generate_what_a_beam_may_not_have_keeps_its_share() -> None:
    options = DecodingOptions(beam_size=2, suppressed=((5,),), no_repeat_ngram_size=2, rules_of_generate=True)
    found = TokenRules(options, EOS_ID, START_ID).log_probs(LOGITS, [3, 8, 3]).tolist()
    assert [token for token, log_prob in enumerate(found) if log_prob == -math.inf] == [5, 8]
    plain = log_softmax([float(x) for x in LOGITS])
    assert [x for x in found if x > -math.inf] == pytest.approx([x for i, x in enumerate(plain) if i not in (5, 8)])


@pytest.mark.parametrize("prefix", [(), (3, 7)])
def test_some_tokens_do_not_come_first_after_the_prefix(prefix: tuple[int, ...]) -> None:
    def forbidden(decoded: list[int]) -> list[int]:
        found = log_probs(decoded, suppressed_first=(5, EOS_ID), target_prefix=prefix)
        return [token for token, log_prob in enumerate(found) if log_prob == -math.inf]

    assert forbidden(list(prefix)) == sorted((5, EOS_ID))
    assert forbidden([*prefix, 8]) == []


def test_where_nothing_may_follow_a_target_ends_with_one_of_its_ends() -> None:
    everything = tuple((token,) for token in range(V))
    assert log_probs([4], suppressed=everything)[EOS_ID] == 0.0
    assert log_probs([4], suppressed=everything, end_ids=(7, 9), min_target_tokens=5)[7] == 0.0


@pytest.mark.parametrize("penalty", [0.5, 1.5, 3.0])
def test_a_repeated_token_is_divided_or_multiplied_once_however_often_it_came(penalty: float) -> None:
    decoded = [3, 7, 3, 3]
    logits = [float(x) for x in LOGITS]
    for token in {3, 7}:
        logits[token] = logits[token] / penalty if logits[token] >= 0 else logits[token] * penalty
    assert log_probs(decoded, repetition_penalty=penalty) == pytest.approx(log_softmax(logits))


@pytest.mark.parametrize(
    ("size", "decoded", "forbidden"),
    [
        (1, [4, 5, 4], {4, 5}),
        (2, [4, 5, 6, 4], {5}),
        (2, [4, 5, 4, 6, 4], {5, 6}),
        (3, [4, 5, 6, 4, 5], {6}),
        (3, [4, 5], set()),
        (2, [], set()),
        (2, [4], set()),
    ],
)
def test_what_would_repeat_an_ngram_is_forbidden(size: int, decoded: list[int], forbidden: set[int]) -> None:
    found = log_probs(decoded, no_repeat_ngram_size=size)
    assert {token for token in range(V) if found[token] == -math.inf} == forbidden


@pytest.mark.parametrize(
    ("decoded", "forbidden"), [([], {9}), ([4], {5, 9}), ([4, 5], {9}), ([7, 8], {9, 10}), ([8, 7], {9}), ([4, 4], {5, 9})]
)
def test_sequences_are_forbidden_where_they_would_end(decoded: list[int], forbidden: set[int]) -> None:
    found = log_probs(decoded, suppressed=((9,), (4, 5), (7, 8, 10)))
    assert {token for token in range(V) if found[token] == -math.inf} == forbidden
    kept = [float(x) for token, x in enumerate(LOGITS) if token not in forbidden]
    assert [x for x in found if x > -math.inf] == pytest.approx(log_softmax(kept)), "what is left sums to one"


@pytest.mark.parametrize(("decoded", "wished"), [([], 6), ([6], 2), ([6, 2], None), ([5], None), ([6, 3], None)])
def test_a_target_is_drawn_towards_what_is_wished_for_as_long_as_it_follows(decoded: list[int], wished: int | None) -> None:
    found = log_probs(decoded, prefix_bias=PrefixBias(tokens=(6, 2), strength=0.4))
    plain = np.exp(log_softmax([float(x) for x in LOGITS]))
    if wished is not None:
        plain *= 0.6
        plain[wished] += 0.4
    assert np.exp(found) == pytest.approx(plain)


def test_candidates_are_the_best_ones_and_equal_ones_come_by_id() -> None:
    logits = np.array([0, 1, 2, 2, 2, 1], np.float32)
    ids, values = TokenRules(DecodingOptions(repetition_penalty=2.0), EOS_ID, START_ID).candidates(logits, [2], 4)
    assert ids.tolist() == [3, 4, 1, 2]
    assert values.tolist() == pytest.approx(np.log(np.exp([2, 2, 1, 1]) / np.exp([0, 1, 1, 2, 2, 1]).sum()), rel=1e-6)


def test_where_nothing_may_follow_a_target_ends() -> None:
    logits = np.full(5, 1.0, np.float32)
    logits[3] = -1e9  # never decoded
    rules = TokenRules(DecodingOptions(suppressed=((0,), (2,), (4,)), min_target_tokens=9), EOS_ID, START_ID)
    ids, values = rules.candidates(logits, [], 2)
    assert (ids[0], values.tolist()) == (EOS_ID, [0.0, -math.inf])


def draws(**sampling: object) -> Counter[int]:
    options = [DecodingOptions(sampling=Sampling(seed=seed, **sampling)) for seed in range(4000)]  # type: ignore[arg-type]  # of tests
    return Counter(int(TokenRules(one, EOS_ID, START_ID).candidates(LOGITS, [4], 2)[0][0]) for one in options)


def expected_shares(tokens: list[int], temperature: float = 1.0) -> dict[int, float]:
    weights = {token: math.exp(float(LOGITS[token]) / temperature) for token in tokens}
    return {token: weight / math.fsum(weights.values()) for token, weight in weights.items()}


BEST_FIRST = sorted(range(V), key=lambda token: -LOGITS[token])


@pytest.mark.parametrize(
    ("sampling", "tokens", "temperature"),
    [({}, BEST_FIRST, 1.0), ({"top_k": 3}, BEST_FIRST[:3], 1.0), ({"top_k": 5, "temperature": 2.5}, BEST_FIRST[:5], 2.5)],
)
def test_draws_have_the_shares_of_the_distribution(sampling: dict[str, object], tokens: list[int], temperature: float) -> None:
    found, expected = draws(**sampling), expected_shares(tokens, temperature)
    assert set(found) <= set(tokens)
    for token, share in expected.items():
        # Five standard deviations of a share of 4000 draws.
        assert abs(found[token] / 4000 - share) <= 5 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_draws_are_from_the_fewest_that_make_up_the_share(top_p: float) -> None:
    shares, total, kept = expected_shares(BEST_FIRST), 0.0, []
    for token in BEST_FIRST:
        kept.append(token)
        total += shares[token]
        if total >= top_p:
            break
    assert set(draws(top_p=top_p)) == set(kept)


def test_a_draw_follows_from_seed_and_position_alone() -> None:
    def drawn(seed: int, position: int) -> int:
        rules = TokenRules(DecodingOptions(sampling=Sampling(seed=seed)), EOS_ID, START_ID)
        return int(rules.candidates(LOGITS, [4] * position, 2)[0][0])

    first = [drawn(7, position) for position in range(40)]
    assert first == [drawn(7, position) for position in range(40)]
    assert first != [drawn(8, position) for position in range(40)]
    assert len(set(first)) > 1


def test_an_impatient_beam_still_finds_as_many_hypotheses_as_are_returned() -> None:
    search = make_lane_search(2, 1, EOS_ID, START_ID)
    search.add(0, DecodingOptions(beam_size=2, num_hypotheses=2, early_stopping=True, patience=0.5, max_target_tokens=5))
    k = search.num_candidates
    ids, log_prob = [EOS_ID, *range(4, 3 + k)], [-0.1 - 3 * rank for rank in range(k)]
    while not search.advance(1, *candidates(ids, log_prob, 2)).finished:
        pass
    assert len(search.hypotheses(0)) == 2


def candidates(ids: list[int], log_prob: list[float], width: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.array([[ids] * width]), np.array([[log_prob] * width], np.float32)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("hidden", [0, 1])
def test_a_prefix_is_taken_whatever_the_model_thinks_and_adds_nothing_to_the_score(width: int, hidden: int) -> None:
    search = make_lane_search(width, 1, EOS_ID, START_ID)
    options = DecodingOptions(
        beam_size=width, target_prefix=(8, 9), hidden_prefix_tokens=hidden, length_penalty=1.0, max_target_tokens=5
    )
    search.add(0, options)
    k = search.num_candidates
    ids, log_prob = [EOS_ID, *range(4, 3 + k)], [-0.1 - 3 * rank for rank in range(k)]
    for _ in range(2):
        assert not search.needs_logits
        assert search.advance(1, *candidates(ids, log_prob, width)).finished == []
    assert search.advance(1, *candidates(ids, log_prob, width)).finished == ([0] if width == 1 else [])
    while width > 1 and not search.advance(1, *candidates(ids, log_prob, width)).finished:
        pass
    best = search.hypotheses(0)[0]
    assert best.target_ids == (8, 9)[hidden:]
    assert best.target_tokens == 3 - hidden
    assert score_of(best) == pytest.approx(-0.1 / 3, rel=1e-6)


def test_rules_of_one_source_leave_its_neighbours_alone_and_leave_with_it() -> None:
    search = make_lane_search(1, 3, EOS_ID, START_ID)
    search.add(0, DecodingOptions())
    assert not search.needs_logits
    search.add(1, DecodingOptions(suppressed=((5,),)))
    assert search.needs_logits
    ids, log_probs_ = np.array([[[5, 6]], [[5, 6]]]), np.full((2, 1, 2), -1.0, np.float32)
    logits = np.zeros((2, 1, V), np.float32)
    logits[:, :, 5], logits[:, :, 7] = 9.0, 4.0
    search.advance(2, ids, log_probs_, logits)
    assert search.next_ids[:2, 0].tolist() == [5, 7]
    search.leave(0)
    search.move(1, 0)
    assert search.needs_logits
    search.leave(0)
    search.add(0, DecodingOptions())
    assert not search.needs_logits
