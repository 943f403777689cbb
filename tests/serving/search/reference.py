"""Searches written a second time, for clarity alone: one source, whole prefixes, no rows."""

from __future__ import annotations

import math

from serving.request import DecodingOptions, FinishReason, Hypothesis
from tests.serving.search.toy import EOS_ID, ToyModel
from tests.support import score_of


def _finish(prefix: tuple[int, ...], total: float, options: DecodingOptions) -> Hypothesis:
    length = len(prefix)
    ended = _is_end(prefix[-1], options)
    return Hypothesis(
        target_ids=prefix[:-1] if ended and not (options.return_end_token and prefix[-1] != EOS_ID) else prefix,
        score=_score(total, length, options),
        finish_reason=FinishReason.EOS if ended else FinishReason.LENGTH,
        target_tokens=length,
    )


def _score(total: float, length: int, options: DecodingOptions) -> float:
    score: float = (total - options.word_penalty * length) / length**options.length_penalty
    return score


def _is_end(token: int, options: DecodingOptions) -> bool:
    return token in (options.end_ids or (EOS_ID,))


def _is_possible(token: int, log_prob: float, length: int, options: DecodingOptions) -> bool:
    if log_prob == -math.inf or token == options.passed_over_id:
        return False
    return not (_is_end(token, options) and length < options.min_target_tokens)


def _best_first(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    return sorted(hypotheses, key=score_of, reverse=True)


def greedy_search(model: ToyModel, options: DecodingOptions) -> list[Hypothesis]:
    prefix: tuple[int, ...] = ()
    total = 0.0
    while len(prefix) < options.max_target_tokens and not (prefix and _is_end(prefix[-1], options)):
        log_probs = model.log_probs(prefix)
        possible = [t for t, log_prob in enumerate(log_probs) if _is_possible(t, log_prob, len(prefix), options)]
        token = max(possible, key=lambda t: log_probs[t])
        prefix, total = (*prefix, token), total + log_probs[token]
    return [_finish(prefix, total, options)]


def beam_search(model: ToyModel, options: DecodingOptions) -> list[Hypothesis]:
    width = options.beam_size
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[Hypothesis] = []
    for length in range(1, options.max_target_tokens + 1):
        longer = [
            ((*prefix, token), total + log_prob)
            for prefix, total in running
            for token, log_prob in enumerate(model.log_probs(prefix))
            if _is_possible(token, log_prob, length - 1, options)
        ]
        longer.sort(key=lambda continuation: continuation[1], reverse=True)
        running = []
        for rank, (prefix, total) in enumerate(longer):
            if _is_end(prefix[-1], options) or length == options.max_target_tokens:
                if rank < width:
                    finished.append(_finish(prefix, total, options))
            elif len(running) < width:
                running.append((prefix, total))
        finished = _best_first(finished)[:width]
        if not running:
            break
        if len(finished) == width and _score(running[0][1], length, options) <= score_of(finished[-1]):
            break
    return finished[: options.num_hypotheses]


def shrinking_beam_search(model: ToyModel, options: DecodingOptions) -> list[Hypothesis]:
    """As Marian has it (src/translator/beam_search.cpp): of the best continuations of those that run, as many as run."""
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    num_running = options.beam_size
    finished: list[Hypothesis] = []
    for length in range(1, options.max_target_tokens + 1):
        longer = [
            ((*prefix, token), total + log_prob)
            for prefix, total in running
            for token, log_prob in enumerate(model.log_probs(prefix))
            if _is_possible(token, log_prob, length - 1, options)
        ]
        longer.sort(key=lambda continuation: continuation[1], reverse=True)
        running = []
        for prefix, total in longer[:num_running]:
            if _is_end(prefix[-1], options) or length == options.max_target_tokens:
                finished.append(_finish(prefix, total, options))
            else:
                running.append((prefix, total))
        # A beam that has fewer continuations than places has none to spare later either.
        num_running = options.beam_size - len(finished)
        if not running:
            break
    return _best_first(finished)[: options.num_hypotheses]


def all_hypotheses(model: ToyModel, options: DecodingOptions) -> list[Hypothesis]:
    """Every sequence there is, best first."""
    found: list[Hypothesis] = []

    def extend(prefix: tuple[int, ...], total: float) -> None:
        for token, log_prob in enumerate(model.log_probs(prefix)):
            if not _is_possible(token, log_prob, len(prefix), options):
                continue
            longer = (*prefix, token)
            if token == EOS_ID or len(longer) == options.max_target_tokens:
                found.append(_finish(longer, total + log_prob, options))
            else:
                extend(longer, total + log_prob)

    extend((), 0.0)
    return _best_first(found)
