"""What a text asks of the engine where one sequence does not do: several draws of it, or alternatives at a position.

Knows options and outcomes; does not know text, threads, event loops or the engine. A plan is asked for sequences, told what came
of them, and asked again, until it has the answer:

    while wanted := plan.wanted():
        plan.take([outcome of each])
    answer = plan.outcome()

Draws are sequences of their own, told apart by ``DecodingOptions.draw``. Alternatives take two rounds, as in CTranslate2
(``return_alternatives``): a beam search of one free token finds the most probable ones that may come after the prefix, then each
of these is forced, and what follows it is decoded with the options of the request.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence as Sequence_
from dataclasses import replace

from serving.request import Alternatives, DecodingOptions, Hypothesis, Outcome, SequenceTimings


class Plan(ABC):
    """The sequences of one text. An outcome with an error ends it: there is no answer then, and nothing more to ask."""

    @abstractmethod
    def wanted(self) -> list[DecodingOptions]:
        """How to decode the sequences of the next round; none: ``outcome`` has the answer."""

    @abstractmethod
    def take(self, outcomes: Sequence_[Outcome]) -> None:
        """What came of those that were wanted, in their order, none with an error."""

    @abstractmethod
    def outcome(self) -> Outcome:
        """What came of the text; timings are of all its sequences."""


def make_plan(options: DecodingOptions, alternatives: Alternatives | None = None) -> Plan:
    """The plan of a text.

    Args:
        options: whose ``num_hypotheses`` are alternatives, draws where it samples, or those of one search. The prefix is
            shorter than the target may be.
        alternatives: None: no such.
    """
    if alternatives is not None:
        return _Alternatives(options, alternatives)
    if options.sampling is not None and options.num_hypotheses > 1:
        return _Draws(options)
    return _OneSequence(options)


class _OneSequence(Plan):
    """All hypotheses are of one search."""

    def __init__(self, options: DecodingOptions) -> None:
        self._wanted = [options]
        self._outcome: Outcome | None = None

    def wanted(self) -> list[DecodingOptions]:
        return self._wanted

    def take(self, outcomes: Sequence_[Outcome]) -> None:
        (self._outcome,) = outcomes
        self._wanted = []

    def outcome(self) -> Outcome:
        assert self._outcome is not None
        return self._outcome


class _Draws(Plan):
    """Each hypothesis is a draw of its own; the best scored is first."""

    def __init__(self, options: DecodingOptions) -> None:
        self._options = options
        self._wanted = [
            replace(options, num_hypotheses=1, return_scores=True, draw=draw) for draw in range(options.num_hypotheses)
        ]
        self._outcomes: Sequence_[Outcome] = ()

    def wanted(self) -> list[DecodingOptions]:
        return self._wanted

    def take(self, outcomes: Sequence_[Outcome]) -> None:
        self._outcomes, self._wanted = outcomes, []

    def outcome(self) -> Outcome:
        best_first = sorted((outcome.hypotheses[0] for outcome in self._outcomes), key=_score, reverse=True)
        return Outcome(
            hypotheses=tuple(_told(hypothesis, self._options) for hypothesis in best_first), timings=_together(self._outcomes)
        )


class _Alternatives(Plan):
    """Each hypothesis goes on with another token after the prefix; the most probable such token is first.

    A score counts that token and what follows it, over the length of the whole, as a score of any hypothesis does.
    """

    def __init__(self, options: DecodingOptions, alternatives: Alternatives) -> None:
        assert len(options.target_prefix) < options.max_target_tokens, "no token is free"
        self._options = options
        self._least = math.log(alternatives.min_probability) if alternatives.min_probability > 0 else -math.inf
        self._wanted = [_expansion(options)]
        self._expanded: Outcome | None = None
        # Of the tokens that are gone on with: their log-probabilities.
        self._log_probs: list[float] = []
        self._hypotheses: tuple[Hypothesis, ...] = ()
        self._timings = SequenceTimings()

    def wanted(self) -> list[DecodingOptions]:
        return self._wanted

    def take(self, outcomes: Sequence_[Outcome]) -> None:
        options = self._options
        if self._expanded is None:
            (self._expanded,) = outcomes
            first, *others = self._expanded.hypotheses
            likely = [first, *(hypothesis for hypothesis in others if _score(hypothesis) >= self._least)]
            self._log_probs = [_score(hypothesis) for hypothesis in likely]
            hidden = options.target_prefix[: options.hidden_prefix_tokens]
            self._wanted = [_continuation(options, (*hidden, *hypothesis.target_ids), i) for i, hypothesis in enumerate(likely)]
        else:
            self._hypotheses = tuple(
                self._whole(outcome.hypotheses[0], log_prob) for outcome, log_prob in zip(outcomes, self._log_probs, strict=True)
            )
            self._timings, self._wanted = _in_turn(self._expanded.timings, _together(outcomes)), []

    def _whole(self, hypothesis: Hypothesis, log_prob: float) -> Hypothesis:
        """A continuation's hypothesis with the token that it was forced to go on with."""
        options = self._options
        scores = hypothesis.token_scores
        at = len(options.target_prefix) - options.hidden_prefix_tokens
        if scores is not None:
            scores = (*scores[:at], log_prob, *scores[at + 1 :])
        length = hypothesis.target_tokens + options.hidden_prefix_tokens
        score = _score(hypothesis) + log_prob / length**options.length_penalty
        return _told(replace(hypothesis, score=score, token_scores=scores), options)

    def outcome(self) -> Outcome:
        return Outcome(hypotheses=self._hypotheses, timings=self._timings)


def _expansion(options: DecodingOptions) -> DecodingOptions:
    """One free token after the prefix, not an end; the scores are the tokens' log-probabilities."""
    length = len(options.target_prefix) + 1
    return replace(
        options,
        beam_size=options.num_hypotheses,
        length_penalty=0.0,
        word_penalty=0.0,
        coverage_penalty=0.0,
        min_target_tokens=max(options.min_target_tokens, length),
        max_target_tokens=length,
        return_scores=True,
        return_token_scores=False,
        return_attention=False,
        early_stopping=False,
        # It is no hypothesis, and not cut.
        ends_when_cut=False,
        sampling=None,
    )


def _continuation(options: DecodingOptions, prefix: tuple[int, ...], draw: int) -> DecodingOptions:
    """What follows a prefix that ends in the token of an alternative."""
    return replace(
        options,
        num_hypotheses=1,
        target_prefix=prefix,
        suppressed_first=(),
        ends_freely_after_prefix=True,
        return_scores=True,
        # An alternative in the last place stays what it is.
        ends_when_cut=options.ends_when_cut and len(prefix) < options.max_target_tokens,
        draw=draw,
    )


def _score(hypothesis: Hypothesis) -> float:
    assert hypothesis.score is not None
    return hypothesis.score


def _told(hypothesis: Hypothesis, options: DecodingOptions) -> Hypothesis:
    """A hypothesis whose score was needed, as the caller wants it."""
    return hypothesis if options.return_scores else replace(hypothesis, score=None)


def _in_turn(first: SequenceTimings, then: SequenceTimings) -> SequenceTimings:
    """Of two rounds, one after the other."""
    steps = first.steps + then.steps
    rows = first.mean_rows_per_step * first.steps + then.mean_rows_per_step * then.steps
    return SequenceTimings(
        queue_s=first.queue_s + then.queue_s,
        encode_s=first.encode_s + then.encode_s,
        decode_s=first.decode_s + then.decode_s,
        steps=steps,
        mean_rows_per_step=rows / max(1, steps),
    )


def _together(outcomes: Sequence_[Outcome]) -> SequenceTimings:
    """Of the sequences of one round: what took longest, and all steps."""
    timings = [outcome.timings for outcome in outcomes]
    steps = sum(of_one.steps for of_one in timings)
    return SequenceTimings(
        queue_s=max(of_one.queue_s for of_one in timings),
        encode_s=max(of_one.encode_s for of_one in timings),
        decode_s=max(of_one.decode_s for of_one in timings),
        steps=steps,
        mean_rows_per_step=sum(of_one.mean_rows_per_step * of_one.steps for of_one in timings) / max(1, steps),
    )
