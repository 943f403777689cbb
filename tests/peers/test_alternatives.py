"""Alternatives at a position against CTranslate2's ``return_alternatives``.

At length penalty 0: CTranslate2 counts the length of what follows the alternative, here it is that of the whole target.
"""

from __future__ import annotations

import pytest

from serving.plan import make_plan
from serving.request import Alternatives, DecodingOptions
from tests.peers.ctranslate2_peer import Peers
from tests.peers.subject import Subject

pytestmark = pytest.mark.slow

LIMIT = 30
LOG_PROB_TOLERANCE = 1e-3


@pytest.mark.parametrize("prefix_tokens", [0, 1, 3])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_alternatives_are_those_of_ctranslate2(
    subject: Subject, ctranslate2_peers: Peers, beam_size: int, prefix_tokens: int
) -> None:
    sources = subject.sources()[:12]
    greedy = subject.decode(sources, DecodingOptions(max_target_tokens=LIMIT))
    asked = [
        DecodingOptions(
            beam_size=beam_size,
            num_hypotheses=5,
            length_penalty=0.0,
            early_stopping=True,
            max_target_tokens=LIMIT,
            target_prefix=usual.target_ids[:prefix_tokens],
            return_scores=True,
        )
        for (usual,) in greedy
    ]
    plans = [make_plan(options, Alternatives()) for options in asked]
    while wanted := [(plan, source, plan.wanted()) for plan, source in zip(plans, sources, strict=True) if plan.wanted()]:
        outcomes = iter(subject.outcomes([(source, options) for _, source, of_one in wanted for options in of_one]))
        for plan, _, of_one in wanted:
            plan.take([next(outcomes) for _ in of_one])
    for source, options, plan in zip(sources, asked, plans, strict=True):
        ours = [(hypothesis.target_ids, hypothesis.score) for hypothesis in plan.outcome().hypotheses]
        theirs = ctranslate2_peers["fp32"].alternatives(source, options)
        assert [ids for ids, _ in ours] == [ids for ids, _ in theirs]
        assert len(ours) == 5
        # An end in the place of the alternative keeps its share of the probability here, and CTranslate2 takes it from it: all of
        # a source's scores differ by that.
        apart = [mine - their for (_, mine), (_, their) in zip(ours, theirs, strict=True) if mine is not None]
        assert max(apart) <= LOG_PROB_TOLERANCE
        assert max(apart) - min(apart) <= LOG_PROB_TOLERANCE
