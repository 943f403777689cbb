"""Beam search over rows that keep their place.

Knows cumulated log-probabilities, rows and which rows share a prefix; does not know the caches' arrays.

Which hypotheses live, end and win follows `_beam_search` of Hugging Face transformers (generation/utils.py, since 4.50) with
``early_stopping=False``, or with the options that say so CTranslate2 or Marian. Where they live is our own: no cache is ever
reordered.

A step, worked through. Width 4; the decoder has just read position 3, so 4 positions are cached. What the rows hold
(position 0 is the start token), and the best four continuations:

    row 0   <s> the black dog          rank 0   row 0 + "runs"
    row 1   <s> the black cat          rank 1   row 2 + "is"
    row 2   <s> a   dog   that         rank 2   row 0 + "sits"
    row 3   <s> the dog   that         rank 3   row 0 + "is"

Row 0 has three children, row 2 has one, rows 1 and 3 have none: they are dead. The best child of a row stays in it, at no
cost: "runs" in row 0, "is" in row 2. The other children, in the order of their rank, take the dead rows in the order of
theirs: "sits" goes to row 1, "is" to row 3. A row that takes over a hypothesis needs its past, but not all of it: rows 0
and 1 agree on positions 0 to 2 ("<s> the black"), rows 0 and 3 on positions 0 and 1:

    Fork(from_row=0, to_row=1, start=3, stop=4)
    Fork(from_row=0, to_row=3, start=2, stop=4)

How far any two rows agree is kept in ``shared`` [W, W], which says here shared[0, 1] = 3, shared[0, 3] = 2. For the rows
after the step it is read off the rows before: children of different parents agree as far as the parents do, children of
one parent in all that is cached. With the diagonal set to the number of cached positions these are one rule,
shared'[a, b] = shared[origin[a], origin[b]], where origin = [0, 0, 2, 0] is the row that each row's hypothesis came from.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.request import DecodingOptions, FinishReason, Hypothesis
from serving.search.base import Advance, Fork, LaneSearch


@dataclass(frozen=True, slots=True)
class _Continuations:
    """Hypotheses made longer by one token, best first: arrays [slots, how many]."""

    # Cumulated log-probabilities; -inf where there is no such continuation.
    scores: NDArray[np.float64]
    ids: NDArray[np.int64]
    # Beam (row of the slot) that each one goes on from.
    parents: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A hypothesis that ended."""

    score: float
    target_ids: tuple[int, ...]
    finish_reason: FinishReason
    target_tokens: int
    token_scores: tuple[float, ...] | None
    attention: NDArray[np.float32] | None


class BeamSearch(LaneSearch):
    """Width W above 1.

    At each step the best 2W continuations are looked at. The best W of them that do not stop run on. Those that stop (at the
    end-of-sentence token, or all at max_target_tokens) and are among the best W are kept, the best W of the whole search. A
    source is done when W are kept and the best running hypothesis, scored at its present length, is no better than the worst
    of them. With ``early_stopping`` it is done when ``patience`` times W have ended, as in CTranslate2. With ``shrinking_beam``
    only so many continuations are looked at as hypotheses run, and those of them that stop are not replaced, until none runs, as
    in Marian (Bahdanau et al. 2015, section 4.2, search so too).

    So every step that leaves out a continuation keeps or runs W others, and each that runs leads to one kept at least: never
    fewer than W hypotheses in the end, unless there are fewer sequences.
    """

    def __init__(self, width: int, num_slots: int, capacity_tokens: int, eos_id: int, decoder_start_id: int) -> None:
        # 2W are looked at, and the end-of-sentence token may have to be passed over.
        super().__init__(width, num_slots, capacity_tokens, eos_id, decoder_start_id, num_candidates=2 * width + 1)
        # [slots, W], of the hypothesis in each row; -inf: none.
        self._scores: NDArray[np.float64] = np.full((num_slots, width), -np.inf)
        # [slots, W, W], cached positions from 0 on that two rows of a slot have in common.
        self._shared: NDArray[np.int32] = np.zeros((num_slots, width, width), np.int32)
        # Best first, at most W; with early stopping those that are returned.
        self._kept: list[list[_Kept]] = [[] for _ in range(num_slots)]
        # [slots], how many have ended among the best W of a step.
        self._num_ended: NDArray[np.int64] = np.zeros(num_slots, np.int64)
        # [slots], what a running hypothesis has to beat: the score of the last of W kept; -inf while there are fewer; inf where
        # so many have ended that the search stops, whatever runs.
        self._to_beat: NDArray[np.float64] = np.full(num_slots, -np.inf)
        # [slots], whether a hypothesis ended as the best continuation of its step.
        self._best_has_ended: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        # [slots], see DecodingOptions.
        self._shrinks: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self._slots = np.arange(num_slots)[:, None]
        self._beams = np.arange(width)
        self._is_better_rank: NDArray[np.bool_] = self._beams < self._beams[:, None]

    def add(self, slot: int, options: DecodingOptions, source_tokens: int = 0) -> None:
        """Start a source in a slot that is free; see `LaneSearch.add`."""
        super().add(slot, options, source_tokens)
        self._scores[slot] = -np.inf
        self._scores[slot, 0] = 0.0
        # Every row reads the start token at position 0.
        self._shared[slot] = 1
        self._kept[slot] = []
        self._num_ended[slot] = 0
        self._to_beat[slot] = -np.inf
        self._best_has_ended[slot] = False
        self._shrinks[slot] = options.shrinking_beam

    def needs_log_probs(self, num_slots: int) -> bool:
        """Always: hypotheses of one source are compared by their sums."""
        return True

    def _advance(self, num_slots: int, candidate_ids: NDArray[np.int64], candidate_log_probs: NDArray[np.float32]) -> Advance:
        """Take one more token in each of the slots 0 to num_slots - 1; see `LaneSearch.advance`."""
        # With the token that is now taken; also the number of positions that are cached by now.
        lengths = self.num_tokens[:num_slots, 0] + 1
        at_limit = lengths >= self._max_tokens[:num_slots]
        best = self._best_continuations(candidate_ids, candidate_log_probs)
        if self._shrinks[:num_slots].any():
            self._shrink(best)
        stops = self._ends(best.ids) | at_limit[:, None]
        self._keep(best, stops)
        running = self._best_running(best, stops)
        done = at_limit | ~self._can_improve(running.scores[:, 0], lengths)
        forks = self._place(running, lengths, done)
        return Advance(np.flatnonzero(done).tolist(), forks)

    def hypotheses(self, slot: int) -> tuple[Hypothesis, ...]:
        """The best of a finished slot; see `LaneSearch.hypotheses`."""
        options = self._options[slot]
        best = self._kept[slot][: options.num_hypotheses]
        if not all(math.isfinite(kept.score) for kept in best):
            return ()
        return tuple(
            Hypothesis(
                target_ids=kept.target_ids[options.hidden_prefix_tokens :],
                score=kept.score if options.return_scores else None,
                finish_reason=kept.finish_reason,
                target_tokens=kept.target_tokens - options.hidden_prefix_tokens,
                token_scores=kept.token_scores,
                attention=kept.attention,
            )
            for kept in best
        )

    def decided(self, slot: int) -> NDArray[np.int32]:
        """What all running hypotheses have in common, and the best of those that ended with them."""
        alive = np.flatnonzero(self._scores[slot] > -np.inf)
        length = int(self.num_tokens[slot, 0])
        if not len(alive):
            return self.tokens[slot, 0, :0]
        if len(alive) > 1:
            # The start token is no token of the target.
            length = int(self._shared[slot, alive[0], alive].min()) - 1
        common = self.tokens[slot, alive[0], :length]
        if self._kept[slot]:
            ended = self._kept[slot][0].target_ids[:length]
            differ = np.flatnonzero(common[: len(ended)] != np.array(ended, np.int32))
            common = common[: differ[0] if len(differ) else len(ended)]
        return common

    def move(self, from_slot: int, to_slot: int) -> None:
        """Move a source into a slot that is free."""
        super().move(from_slot, to_slot)
        for array in (self._scores, self._shared, self._num_ended, self._to_beat, self._best_has_ended, self._shrinks):
            array[to_slot] = array[from_slot]
        self._kept[to_slot] = self._kept[from_slot]

    def _best_continuations(self, ids: NDArray[np.int64], log_probs: NDArray[np.float32]) -> _Continuations:
        """The best 2W of each slot; among equals the lower row, then the earlier candidate is first."""
        n, width, num_candidates = ids.shape
        scores = self._scores[:n, :, None] + log_probs
        too_early = self.num_tokens[:n, 0] < self._min_tokens[:n]
        if too_early.any():
            scores[too_early[:, None, None] & self._ends(ids)] = -np.inf
        scores = scores.reshape(n, width * num_candidates)
        order = np.argsort(-scores, axis=1, kind="stable")
        if self._num_ruled:
            self._put_needless_ends_last(ids, order)
        order = order[:, : 2 * width]
        flat = order + self._slots[:n] * (width * num_candidates)
        return _Continuations(scores.take(flat), ids.take(flat), order // num_candidates)

    def _shrink(self, best: _Continuations) -> None:
        """Leave out continuations beyond those of as many hypotheses as run, where beams shrink."""
        n, num_looked_at = best.scores.shape
        num_running = np.where(self._shrinks[:n], self.width - self._num_ended[:n], num_looked_at)
        best.scores[np.arange(num_looked_at) >= num_running[:, None]] = -np.inf

    def _put_needless_ends_last(self, ids: NDArray[np.int64], order: NDArray[np.intp]) -> None:
        """Leave W ends among the best 2W of sources with several end tokens: more are never kept, and W have to run on.

        Right after a prefix all continuations are those of one row. With early stopping only the best of them may be an end, as
        CTranslate2 has it: others would soon be as many as stop the search.
        """
        for slot, options in enumerate(self._options[: len(ids)]):
            is_after_prefix = 0 < len(options.target_prefix) == self.num_tokens[slot, 0] and options.early_stopping
            is_after_prefix = is_after_prefix and not (options.rules_of_generate or options.ends_freely_after_prefix)
            if options.end_ids or is_after_prefix:
                is_end = np.isin(ids[slot].take(order[slot]), self._end_ids(slot))
                is_needless = is_end & (np.cumsum(is_end) > self.width)
                if is_after_prefix:
                    is_needless[1:] |= is_end[1:]
                order[slot] = order[slot, np.argsort(is_needless, kind="stable")]

    def _best_running(self, best: _Continuations, stops: NDArray[np.bool_]) -> _Continuations:
        """The best W that do not stop. At the limit, where all do, it does not matter what they are."""
        # There are W: of 2W that are looked at, no more than W are ends; a row has one, but for several end tokens. Stable: best
        # first still.
        order = np.argsort(stops, axis=1, kind="stable")[:, : self.width]
        flat = order + self._slots[: len(stops)] * stops.shape[1]
        return _Continuations(best.scores.take(flat), best.ids.take(flat), best.parents.take(flat))

    def _keep(self, best: _Continuations, stops: NDArray[np.bool_]) -> None:
        """Keep what stops among the best W."""
        w = self.width
        slots, ranks = np.nonzero(stops[:, :w] & (best.scores[:, :w] > -np.inf))
        for slot, rank in zip(slots.tolist(), ranks.tolist(), strict=True):
            kept = self._kept[slot]
            length = int(self.num_tokens[slot, 0]) + 1
            options = self._options[slot]
            parent, total = int(best.parents[slot, rank]), float(best.scores[slot, rank])
            score = self._score(slot, parent, length, total)
            if not options.early_stopping and score <= self._to_beat[slot]:
                continue
            ids = self.tokens[slot, parent, : length - 1].tolist()
            token = int(best.ids[slot, rank])
            reason = self._reason(slot, token, length)
            if self._is_returned(slot, token, length):
                ids.append(token)
            token_scores = self._token_scores(slot, parent, length, total)
            attention = self._target_attention(slot, parent, len(ids))
            ended = _Kept(score, tuple(ids), reason, length, token_scores, attention)
            bisect.insort(kept, ended, key=lambda other: -other.score)
            self._num_ended[slot] += 1
            if options.early_stopping:
                del kept[options.num_hypotheses :]
                num_ended = int(self._num_ended[slot])
                no_penalty_rewards_length = options.length_penalty == options.coverage_penalty == 0 <= options.word_penalty
                if no_penalty_rewards_length and not options.rules_of_generate:
                    # Nothing overtakes a hypothesis that ended as the best of its step, and before there is one something may.
                    self._best_has_ended[slot] |= rank == 0
                    is_enough = self._best_has_ended[slot] and num_ended >= options.num_hypotheses
                else:
                    is_enough = num_ended >= max(options.num_hypotheses, math.floor(w * options.patience + 0.5))
                if is_enough:
                    self._to_beat[slot] = np.inf
                continue
            del kept[w:]
            if len(kept) == w:
                self._to_beat[slot] = kept[-1].score

    def _can_improve(self, best_running: NDArray[np.float64], lengths: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether a hypothesis still runs, [slots], and would be kept if it ended now."""
        can = best_running > -np.inf
        # The power is taken one by one: a vectorized one may round differently with the place in the array.
        for slot in np.flatnonzero(self._to_beat[: len(can)] > -np.inf).tolist():
            options, length = self._options[slot], int(lengths[slot])
            score = (float(best_running[slot]) - options.word_penalty * length) / length**options.length_penalty
            can[slot] = score > self._to_beat[slot]
        return can

    def _place(self, running: _Continuations, lengths: NDArray[np.int32], done: NDArray[np.bool_]) -> list[Fork]:
        """Give each running hypothesis a row: the worked example above."""
        n = len(lengths)
        slots, parents = self._slots[:n], running.parents
        self._shared[:n, self._beams, self._beams] = lengths[:, None]
        # [slots, W], of the children that have a better sibling.
        is_extra = ((parents[:, :, None] == parents[:, None, :]) & self._is_better_rank).any(axis=2)
        is_dead = np.ones(parents.shape, np.bool_)
        is_dead[slots, parents] = False
        rows = parents.copy()
        # As many children are extra as rows are dead, in each slot, and both masks are read slot by slot.
        rows[is_extra] = np.nonzero(is_dead)[1]
        forks = self._fork(np.nonzero(is_extra)[0], parents[is_extra], rows[is_extra], lengths, done)

        origins = np.empty_like(parents)
        origins[slots, rows] = parents
        self._shared[:n] = self._shared[slots[:, :, None], origins[:, :, None], origins[:, None, :]]
        self._scores[slots, rows] = running.scores
        self.next_ids[slots, rows] = running.ids
        self.tokens[slots, rows, lengths[:, None] - 1] = running.ids
        if self._num_token_scored:
            assert self.sums is not None
            self.sums[slots, rows, lengths[:, None] - 1] = running.scores
        self.num_tokens[:n] = lengths[:, None]
        return forks

    def _fork(
        self,
        slots: NDArray[np.intp],
        from_beams: NDArray[np.intp],
        to_beams: NDArray[np.intp],
        lengths: NDArray[np.int32],
        done: NDArray[np.bool_],
    ) -> list[Fork]:
        """Copy the tokens of hypotheses that go on in a second row; say what to copy in the caches. Slots and beams: [forks]."""
        if not len(slots):
            return []
        starts, stops = self._shared[slots, from_beams, to_beams], lengths[slots]
        longest = int(stops.max()) - 1
        self.tokens[slots, to_beams, :longest] = self.tokens[slots, from_beams, :longest]
        if self._num_token_scored:
            assert self.sums is not None
            self.sums[slots, to_beams, :longest] = self.sums[slots, from_beams, :longest]
        if self._attention.is_wanted:
            self._attention.fork(slots, from_beams, to_beams, starts, stops)
        is_needed = (starts < stops) & ~done[slots]
        first_rows = slots * self.width
        columns = (first_rows + from_beams, first_rows + to_beams, starts, stops)
        return [Fork(*fork) for fork in zip(*(column[is_needed].tolist() for column in columns), strict=True)]
