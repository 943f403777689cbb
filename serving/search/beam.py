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

How far any two rows agree is kept in ``shared`` [W][W], which says here shared[0][1] = 3, shared[0][3] = 2. A dead row that takes
over a hypothesis takes over that row's line of ``shared`` too, and shares with the row itself all that is cached.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.request import DecodingOptions, FinishReason, Hypothesis
from serving.search.attention import AttentionHistory
from serving.search.base import Advance, Fork, LaneSearch, Source


class _Candidates(NamedTuple):
    """What may come next: memoryviews [slots, W, K], each row's best first."""

    ids: memoryview[int]
    # Of numbers that are floating point.
    log_probs: memoryview[Any]
    num_of_row: int


# A hypothesis made longer by one token: its log-probability, that token, and the beam (row of the source) that it goes on from.
_Continuation = tuple[float, int, int]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A hypothesis that ended."""

    score: float
    target_ids: tuple[int, ...]
    finish_reason: FinishReason
    target_tokens: int
    token_scores: tuple[float, ...] | None
    attention: NDArray[np.float32] | None


@dataclass(slots=True, kw_only=True)
class _BeamSource(Source):
    """A source and its W rows."""

    # [W][W], cached positions from 0 on that two rows have in common; of a row and itself, nothing is said.
    shared: list[list[int]]
    # Best first, at most W; with early stopping those that are returned.
    kept: list[_Kept]
    # How many have ended among the best W of a step.
    num_ended: int = 0
    # What a running hypothesis has to beat: the score of the last of W kept; -inf while there are fewer; inf where so many have
    # ended that the search stops, whatever runs.
    to_beat: float = -math.inf
    # Whether a hypothesis ended as the best continuation of its step.
    best_has_ended: bool = False

    def advance(self, candidates: _Candidates, slot: int) -> list[_Continuation]:
        """Keep the continuations that end now; returns those that run on, best first, at most W: none once it is done."""
        width, end_ids, passed_over_id = len(self.tokens), self.end_ids(), self.passed_over_id()
        at_limit = self.length + 1 >= self.options.max_target_tokens
        num_looked_at = width - self.num_ended if self.options.shrinking_beam else 2 * width
        running: list[_Continuation] = []
        rank = num_ends = 0
        for total, token, parent in self._best_first(candidates, slot):
            is_end = token in end_ids
            if token == passed_over_id or (is_end and self.is_too_early()):
                continue
            if is_end:
                num_ends += 1
                if self._is_needless(rank, num_ends):
                    continue
            if not is_end and not at_limit:
                running.append((total, token, parent))
                if len(running) == width:
                    break
            elif rank < width:
                self._keep(rank, total, token, parent)
            rank += 1
            if rank == num_looked_at:
                break
        return running if running and self._can_improve(running[0][0]) else []

    def _best_first(self, candidates: _Candidates, slot: int) -> Iterator[_Continuation]:
        """Every possible continuation; among equals that of the lower row, then of the earlier candidate is first."""
        ids, log_probs, num_candidates = candidates
        # The best of each row that is not taken yet, of which few ever are: negated total, beam, candidate.
        heads: list[tuple[float, int, int]] = []
        for beam, before in enumerate(self.totals):
            total = before + log_probs[slot, beam, 0]
            # Of a row whose numbers are none, nothing is possible either.
            if total > -math.inf:
                heads.append((-total, beam, 0))
        heapq.heapify(heads)
        while heads:
            negated, beam, candidate = heads[0]
            yield -negated, ids[slot, beam, candidate], beam
            candidate += 1
            total = self.totals[beam] + log_probs[slot, beam, candidate] if candidate < num_candidates else -math.inf
            if total > -math.inf:
                heapq.heapreplace(heads, (-total, beam, candidate))
            else:
                heapq.heappop(heads)

    def _is_needless(self, rank: int, num_ends: int) -> bool:
        """Whether the ``num_ends``-th end of a step is passed over, with the place for another continuation.

        More than W ends are never kept, and W continuations have to run on; a source with several end tokens can have them. Right
        after a prefix all continuations are those of one row. With early stopping only the best of them may be an end, as
        CTranslate2 has it: others would soon be as many as stop the search.
        """
        if num_ends > len(self.tokens):
            return True
        options = self.options
        is_after_prefix = 0 < len(options.target_prefix) == self.length and options.early_stopping
        return rank > 0 and is_after_prefix and not (options.rules_of_generate or options.ends_freely_after_prefix)

    def _keep(self, rank: int, total: float, token: int, parent: int) -> None:
        """Keep a continuation that ended as the ``rank``-th of its step, which is among the best W."""
        options, kept, length = self.options, self.kept, self.length + 1
        score = self.score(parent, length, total)
        if not options.early_stopping and score <= self.to_beat:
            return
        ids = tuple(self.tokens[parent])
        if self.is_returned(token, length):
            ids = (*ids, token)
        token_scores = self.token_scores(parent, length, total)
        attention = self.target_attention(parent, len(ids))
        ended = _Kept(score, ids, self.reason(token, length), length, token_scores, attention)
        bisect.insort(kept, ended, key=lambda other: -other.score)
        self.num_ended += 1
        if not options.early_stopping:
            del kept[len(self.tokens) :]
            if len(kept) == len(self.tokens):
                self.to_beat = kept[-1].score
            return
        del kept[options.num_hypotheses :]
        no_penalty_rewards_length = options.length_penalty == options.coverage_penalty == 0 <= options.word_penalty
        if no_penalty_rewards_length and not options.rules_of_generate:
            # Nothing overtakes a hypothesis that ended as the best of its step, and before there is one something may.
            self.best_has_ended |= rank == 0
            is_enough = self.best_has_ended and self.num_ended >= options.num_hypotheses
        else:
            enough = math.floor(len(self.tokens) * options.patience + 0.5)
            is_enough = self.num_ended >= max(options.num_hypotheses, enough)
        if is_enough:
            self.to_beat = math.inf

    def _can_improve(self, best_running: float) -> bool:
        """Whether the best that runs would be kept if it ended now."""
        if self.to_beat == -math.inf:
            return True
        options, length = self.options, self.length + 1
        score = (best_running - options.word_penalty * length) / math.pow(length, options.length_penalty)
        return score > self.to_beat

    def place(self, running: list[_Continuation], first_row: int, forks: list[Fork]) -> None:
        """Give each running hypothesis a row: the worked example of this module.

        Args:
            running: at least one, at most W, best first.
            first_row: of the lane, which is beam 0 of this source.
            forks: here those are added that the caches need.
        """
        # Of each row that holds a hypothesis, that one's log-probability and newest token.
        rows: list[tuple[float, int] | None] = [None] * len(self.tokens)
        extra: list[_Continuation] = []
        for total, token, parent in running:
            if rows[parent] is None:
                rows[parent] = total, token
            else:
                extra.append((total, token, parent))
        if extra:
            dead = [row for row, held in enumerate(rows) if held is None]
            # As many are dead, or more.
            for row, (total, token, parent) in zip(dead, extra, strict=False):
                rows[row] = total, token
                start, stop = self._fork(parent, row)
                if start < stop:
                    forks.append(Fork(first_row + parent, first_row + row, start, stop))
        for row, held in enumerate(rows):
            # What a row reads that holds no hypothesis does not matter: nothing goes on from it, and what it shares with others
            # is at least what ``shared`` says.
            self.totals[row], token = held or (-math.inf, self.eos_id)
            self.tokens[row].append(token)
            if self.sums is not None:
                self.sums[row].append(self.totals[row])
        self.length += 1

    def _fork(self, from_beam: int, to_beam: int) -> tuple[int, int]:
        """Let a dead row hold what another does; returns which positions of their caches differ, from and up to."""
        start, stop = self.shared[from_beam][to_beam], self.length + 1
        self.tokens[to_beam] = self.tokens[from_beam].copy()
        if self.sums is not None:
            self.sums[to_beam] = self.sums[from_beam].copy()
        if self.attention is not None:
            self.attention.fork(from_beam, to_beam, start, stop)
        self.shared[to_beam] = self.shared[from_beam].copy()
        for beam, shared in enumerate(self.shared):
            shared[to_beam] = self.shared[to_beam][beam]
        self.shared[from_beam][to_beam] = self.shared[to_beam][from_beam] = stop
        return start, stop


class BeamSearch(LaneSearch[_BeamSource]):
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

    def __init__(self, width: int, num_slots: int, eos_id: int, decoder_start_id: int) -> None:
        # 2W are looked at, and the end-of-sentence token may have to be passed over.
        super().__init__(width, num_slots, eos_id, decoder_start_id, num_candidates=2 * width + 1)

    @property
    def needs_log_probs(self) -> bool:
        """Always: hypotheses of one source are compared by their sums."""
        return True

    def _start(self, options: DecodingOptions, attention: AttentionHistory | None) -> _BeamSource:
        rows = range(self.width)
        return _BeamSource(
            options=options,
            eos_id=self._eos_id,
            rules=self._rules(options),
            tokens=[[] for _ in rows],
            totals=[0.0 if row == 0 else -math.inf for row in rows],
            sums=[[] for _ in rows] if options.return_token_scores else None,
            attention=attention,
            # Every row reads the start token at position 0.
            shared=[[1] * self.width for _ in rows],
            kept=[],
        )

    def _advance(self, num_slots: int, candidate_ids: NDArray[np.int64], candidate_log_probs: NDArray[np.float32]) -> Advance:
        """Take one more token in each of the slots 0 to num_slots - 1; see `LaneSearch.advance`."""
        finished: list[int] = []
        forks: list[Fork] = []
        candidates = _Candidates(candidate_ids.data, candidate_log_probs.data, candidate_ids.shape[2])
        for slot in range(num_slots):
            source = self._sources[slot]
            running = source.advance(candidates, slot)
            if not running:
                finished.append(slot)
                continue
            first_row = slot * self.width
            source.place(running, first_row, forks)
            for row, tokens in enumerate(source.tokens, first_row):
                self._next_id_of_row[row] = tokens[-1]
                self._num_tokens_of_row[row] = source.length
        return Advance(finished, forks)

    def hypotheses(self, slot: int) -> tuple[Hypothesis, ...]:
        """The best of a finished slot; see `LaneSearch.hypotheses`."""
        source = self._sources[slot]
        options = source.options
        best = source.kept[: options.num_hypotheses]
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

    def decided(self, slot: int) -> list[int]:
        """What all running hypotheses have in common, and the best of those that ended with them."""
        source = self._sources[slot]
        alive = [row for row, total in enumerate(source.totals) if total > -math.inf]
        if not alive:
            return []
        first, *others = alive
        # The start token is no token of the target.
        length = min((source.shared[first][other] - 1 for other in others), default=source.length)
        common = source.tokens[first][:length]
        if source.kept:
            differ = (at for at, (one, other) in enumerate(zip(common, source.kept[0].target_ids, strict=False)) if one != other)
            common = common[: next(differ, len(source.kept[0].target_ids))]
        return common
