"""Our answers against CTranslate2's on the same weights.

Scores mean the same: both divide by the length with the end-of-sentence token, and both normalize over the tokens that may be
decoded. What differs is when a beam search ends, by CTranslate2's source (``src/decoding.cc``, 4.8): as soon as
``beam_size * patience`` hypotheses have ended, or, without a length penalty, as soon as the best continuation of a step is one
that ends. Ours goes on while the best running hypothesis, scored at its present length, beats the worst that is kept.

Which continuations run on is the same in both. So without a length penalty the best hypothesis is the same: log-probabilities
only fall, and none that runs overtakes one that ended as the best of its step. With one it may differ, but then ours has the
higher score: it never ends before ``beam_size`` hypotheses have, so it has seen all that CTranslate2 chose from.
"""

from __future__ import annotations

from typing import Any

import pytest

from serving.request import DecodingOptions
from tests.peers.ctranslate2_peer import Comparison, Peers, compare
from tests.peers.subject import Subject
from tests.support import score_of

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

LOG_PROB_TOLERANCE = 1e-3
# Of scores of different hypotheses: closer ones are equally good.
SCORE_TOLERANCE = 1e-5
# Either program's int8 changes some 5 to 12 % of its own fp32 answers, and each rounds in its own way (CTranslate2 the embeddings
# too), so up to a quarter may differ where the two are unlucky in different places; more would be a fault of one of them.
LEAST_INT8_AGREEMENT = 0.75
# In fp32, with a length penalty of at most 1, on sentences a few words long: that a hypothesis wins although beam_size others
# ended before it is rare there. With a penalty of 2 it is not, because a longer one gains more by its length than it loses.
LEAST_BEAM_AGREEMENT = 0.9
MAX_TARGET_TOKENS = 40


@pytest.fixture(scope="module")
def sources(subject: Subject) -> list[tuple[int, ...]]:
    return subject.sources()


@pytest.mark.parametrize("max_target_tokens", [7, MAX_TARGET_TOKENS])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_greedy_is_the_same(
    subject: Subject, ctranslate2_peers: Peers, sources: list[tuple[int, ...]], length_penalty: float, max_target_tokens: int
) -> None:
    options = DecodingOptions(length_penalty=length_penalty, max_target_tokens=max_target_tokens)
    comparison = compare(subject, ctranslate2_peers["fp32"], sources, options)
    assert comparison.different == []
    assert comparison.apart <= LOG_PROB_TOLERANCE


@pytest.mark.parametrize("beam_size", [2, 4, 5])
def test_beams_are_the_same_without_a_length_penalty(
    subject: Subject, ctranslate2_peers: Peers, sources: list[tuple[int, ...]], beam_size: int
) -> None:
    options = DecodingOptions(beam_size=beam_size, length_penalty=0.0, max_target_tokens=MAX_TARGET_TOKENS)
    comparison = compare(subject, ctranslate2_peers["fp32"], sources, options)
    assert comparison.different == []
    assert comparison.apart <= LOG_PROB_TOLERANCE


@pytest.mark.parametrize(("beam_size", "length_penalty"), [(2, 1.0), (4, 0.6), (4, 1.0), (4, 2.0), (5, 1.0)])
def test_beams_differ_only_where_ours_searched_on_and_found_better(
    subject: Subject, ctranslate2_peers: Peers, sources: list[tuple[int, ...]], beam_size: int, length_penalty: float
) -> None:
    options = DecodingOptions(beam_size=beam_size, length_penalty=length_penalty, max_target_tokens=MAX_TARGET_TOKENS)
    comparison = compare(subject, ctranslate2_peers["fp32"], sources, options)
    assert comparison.apart <= LOG_PROB_TOLERANCE
    found = [(mine, its) for mine, its in comparison.different if score_of(mine) < its.score(length_penalty) - SCORE_TOLERANCE]
    assert found == []


@pytest.mark.parametrize("subject", ["trained"], indirect=True)
@pytest.mark.parametrize("length_penalty", [0.6, 1.0])
def test_beams_of_a_trained_model_are_mostly_the_same(
    subject: Subject, ctranslate2_peers: Peers, sources: list[tuple[int, ...]], length_penalty: float
) -> None:
    options = DecodingOptions(beam_size=4, length_penalty=length_penalty, max_target_tokens=MAX_TARGET_TOKENS)
    assert compare(subject, ctranslate2_peers["fp32"], sources, options).agreement >= LEAST_BEAM_AGREEMENT


@pytest.mark.parametrize("subject", ["trained"], indirect=True)
@pytest.mark.parametrize(("beam_size", "length_penalty"), [(1, 1.0), (4, 0.0), (4, 1.0)])
def test_int8_answers_of_a_trained_model_are_mostly_the_same(
    subject: Subject, ctranslate2_peers: Peers, sources: list[tuple[int, ...]], beam_size: int, length_penalty: float
) -> None:
    options = DecodingOptions(beam_size=beam_size, length_penalty=length_penalty, max_target_tokens=MAX_TARGET_TOKENS)
    comparison = compare(subject, ctranslate2_peers["int8"], sources, options, "int8")
    exact = [hypotheses[0] for hypotheses in subject.decode(sources, options)]
    kept_by_ours = sum(mine.target_ids == one.target_ids for mine, one in zip(comparison.ours, exact, strict=True)) / len(exact)
    kept_by_theirs = Comparison(exact, comparison.theirs, options).agreement
    print(f"    int8 leaves {kept_by_ours:.1%} of our fp32 answers as they are, CTranslate2's {kept_by_theirs:.1%}")
    assert comparison.agreement >= LEAST_INT8_AGREEMENT
    # Ours rounds no more coarsely than CTranslate2.
    assert kept_by_ours >= kept_by_theirs - 0.1
