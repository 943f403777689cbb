"""Greedy search: the best token at each step.

Knows one row for each source; does not know beams.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from serving.request import DecodingOptions, Hypothesis
from serving.search.attention import AttentionHistory
from serving.search.base import Advance, LaneSearch, Source


class GreedySearch(LaneSearch[Source]):
    """Width 1: a source ends at its end-of-sentence token, or at max_target_tokens."""

    def __init__(self, width: int, num_slots: int, eos_id: int, decoder_start_id: int) -> None:
        # The second candidate stands in for an end that comes too early, or for a token that is passed over.
        super().__init__(width, num_slots, eos_id, decoder_start_id, num_candidates=2)
        # Sources that want a score, or their tokens'. Of one that does not, ``totals`` may be a sum of logits.
        self._num_scored = 0

    @property
    def needs_log_probs(self) -> bool:
        """Whether any source is to have a score, or its tokens."""
        return self._num_scored > 0

    def _start(self, options: DecodingOptions, attention: AttentionHistory | None) -> Source:
        return Source(
            options=options,
            eos_id=self._eos_id,
            rules=self._rules(options),
            tokens=[[]],
            totals=[0.0],
            sums=[[]] if options.return_token_scores else None,
            attention=attention,
        )

    def _count(self, options: DecodingOptions, by: int) -> None:
        super()._count(options, by)
        self._num_scored += by * (options.return_scores or options.return_token_scores)

    def _advance(self, num_slots: int, candidate_ids: NDArray[np.int64], candidate_log_probs: NDArray[np.float32]) -> Advance:
        """Take one more token in each of the slots 0 to num_slots - 1; see `LaneSearch.advance`."""
        finished: list[int] = []
        ids, log_probs = candidate_ids.data, candidate_log_probs.data
        for slot in range(num_slots):
            source = self._sources[slot]
            token, log_prob = ids[slot, 0, 0], log_probs[slot, 0, 0]
            ends = token in source.end_ids()
            if token == source.passed_over_id():
                token, log_prob = ids[slot, 0, 1], log_probs[slot, 0, 1]
                ends = token in source.end_ids()
            elif ends and source.is_too_early():
                token, log_prob = ids[slot, 0, 1], log_probs[slot, 0, 1]
                ends = False
            source.tokens[0].append(token)
            source.totals[0] += log_prob
            if source.sums is not None:
                source.sums[0].append(source.totals[0])
            source.length += 1
            self._next_id_of_row[slot] = token
            self._num_tokens_of_row[slot] = source.length
            if ends or source.length >= source.options.max_target_tokens:
                finished.append(slot)
        return Advance(finished, [])

    def hypotheses(self, slot: int) -> tuple[Hypothesis, ...]:
        """The one hypothesis of a finished slot."""
        source = self._sources[slot]
        options, length, total = source.options, source.length, source.totals[0]
        if not math.isfinite(total):
            return ()
        ids, last_token = source.tokens[0], source.tokens[0][-1]
        if not source.is_returned(last_token, length):
            ids = ids[:-1]
        return (
            Hypothesis(
                target_ids=tuple(ids[options.hidden_prefix_tokens :]),
                score=source.score(0, length, total) if options.return_scores else None,
                finish_reason=source.reason(last_token, length),
                target_tokens=length - options.hidden_prefix_tokens,
                token_scores=source.token_scores(0, length, total),
                attention=source.target_attention(0, len(ids)),
            ),
        )

    def decided(self, slot: int) -> list[int]:
        """All tokens: none is ever taken back."""
        return self._sources[slot].tokens[0]
