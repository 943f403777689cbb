"""Greedy search: the best token at each step.

Knows one row for each source; does not know beams.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from serving.request import DecodingOptions, Hypothesis
from serving.search.base import Advance, LaneSearch


class GreedySearch(LaneSearch):
    """Width 1: a source ends at its end-of-sentence token, or at max_target_tokens."""

    def __init__(self, width: int, num_slots: int, capacity_tokens: int, eos_id: int, decoder_start_id: int) -> None:
        # The second candidate stands in for an end-of-sentence token that comes too early.
        super().__init__(width, num_slots, capacity_tokens, eos_id, decoder_start_id, num_candidates=2)
        self._slots = np.arange(num_slots)
        # [slots], sum of the log-probabilities so far.
        self._scores: NDArray[np.float64] = np.zeros(num_slots)
        # [slots], whether somebody wants that sum; where nobody does, it is one of logits.
        self._is_scored: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)

    def add(self, slot: int, options: DecodingOptions, source_tokens: int = 0) -> None:
        """Start a source in a slot that is free; see `LaneSearch.add`."""
        super().add(slot, options, source_tokens)
        self._scores[slot] = 0.0
        self._is_scored[slot] = options.return_scores or options.return_token_scores

    def needs_log_probs(self, num_slots: int) -> bool:
        """Whether any source is to have a score, or its tokens."""
        return bool(self._is_scored[:num_slots].any())

    def _advance(self, num_slots: int, candidate_ids: NDArray[np.int64], candidate_log_probs: NDArray[np.float32]) -> Advance:
        """Take one more token in each of the slots 0 to num_slots - 1; see `LaneSearch.advance`."""
        n = num_slots
        positions = self.num_tokens[:n, 0]
        ids, log_probs = candidate_ids[:, 0, 0], candidate_log_probs[:, 0, 0]
        ends = self._ends(ids)
        too_early = ends & (positions < self._min_tokens[:n])
        if too_early.any():
            ids = np.where(too_early, candidate_ids[:, 0, 1], ids)
            log_probs = np.where(too_early, candidate_log_probs[:, 0, 1], log_probs)
            ends &= ~too_early
        self.tokens[self._slots[:n], 0, positions] = ids
        self.next_ids[:n, 0] = ids
        self._scores[:n] += log_probs
        if self._num_token_scored:
            assert self.sums is not None
            self.sums[self._slots[:n], 0, positions] = self._scores[:n]
        self.num_tokens[:n] += 1
        return Advance(np.flatnonzero(ends | (self.num_tokens[:n, 0] >= self._max_tokens[:n])).tolist(), [])

    def hypotheses(self, slot: int) -> tuple[Hypothesis, ...]:
        """The one hypothesis of a finished slot."""
        total = float(self._scores[slot])
        if not math.isfinite(total):
            return ()
        length = int(self.num_tokens[slot, 0])
        options = self._options[slot]
        ids = self.tokens[slot, 0, :length].tolist()
        reason = self._reason(slot, ids[-1], length)
        if not self._is_returned(slot, ids[-1], length):
            ids.pop()
        return (
            Hypothesis(
                target_ids=tuple(ids[options.hidden_prefix_tokens :]),
                score=self._score(slot, 0, length, total) if options.return_scores else None,
                finish_reason=reason,
                target_tokens=length - options.hidden_prefix_tokens,
                token_scores=self._token_scores(slot, 0, length, total),
                attention=self._target_attention(slot, 0, len(ids)),
            ),
        )

    def decided(self, slot: int) -> NDArray[np.int32]:
        """All tokens: none is ever taken back."""
        return self.tokens[slot, 0, : self.num_tokens[slot, 0]]

    def move(self, from_slot: int, to_slot: int) -> None:
        """Move a source into a slot that is free."""
        super().move(from_slot, to_slot)
        self._scores[to_slot] = self._scores[from_slot]
        self._is_scored[to_slot] = self._is_scored[from_slot]
