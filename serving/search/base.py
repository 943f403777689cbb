"""What every search of a lane has in common: its contract, and the state that the decoder step reads.

Knows slots, rows and options; does not know how a token is chosen.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.request import DecodingOptions, FinishReason, Hypothesis
from serving.search.attention import AttentionHistory
from serving.search.rules import TokenRules

_Number = TypeVar("_Number", np.int32, np.float64)
# No token has this id.
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Fork:
    """A hypothesis goes on in a second row: copy its cached positions there. Rows are ``slot * width + beam``."""

    from_row: int
    to_row: int
    # Positions [start, stop) are copied; before start the two rows hold the same already.
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step led to."""

    # Slots that are done, ascending. They are the caller's to free.
    finished: list[int]
    # Of the slots that go on. No row is written by one and read or written by another, so that their order is free.
    forks: list[Fork]


class LaneSearch(ABC):
    """The decoding state of all sources of a lane, which have one beam width and step together.

    State lives in arrays indexed by slot; slots 0 to n-1 are in use. A step of the lane is::

        run the decoder on next_ids and num_tokens of slots 0..n-1
        outcome = search.advance(n, candidate_ids, candidate_log_probs)
        copy outcome.forks in the caches
        take the hypotheses of outcome.finished, then free each such slot: move the last slot into it

    What becomes of a slot depends on that slot's candidates and options alone, to the last bit.

    Attributes:
        width: beams of each source, W.
        num_candidates: next tokens of each row that a step hands in, K; fewer only if the vocabulary is smaller (two at least).
        next_ids: int64 [slots, W], what the next decoder step reads. The same array for life: bind it by address.
        num_tokens: int32 [slots, W], tokens decoded so far, which is the position of next_ids; one value for all beams of a
            slot. The same array for life.
        tokens: int32 [slots, W, capacity], the tokens decoded so far by each row; the start token is not among them.
        sums: float64 [slots, W, capacity], the log-probability of each row's tokens up to each one, of the sources that want it
            told; None before the first of them.
    """

    def __init__(
        self, width: int, num_slots: int, capacity_tokens: int, eos_id: int, decoder_start_id: int, *, num_candidates: int
    ) -> None:
        self.width = width
        self.num_candidates = num_candidates
        self.next_ids: NDArray[np.int64] = np.full((num_slots, width), decoder_start_id, np.int64)
        self.num_tokens: NDArray[np.int32] = np.zeros((num_slots, width), np.int32)
        self.tokens: NDArray[np.int32] = np.zeros((num_slots, width, capacity_tokens), np.int32)
        self.sums: NDArray[np.float64] | None = None
        self._eos_id = eos_id
        self._decoder_start_id = decoder_start_id
        self._options = [DecodingOptions(beam_size=width)] * num_slots
        self._rules: list[TokenRules | None] = [None] * num_slots
        # Sources of the lane that ask anything of single tokens.
        self._num_ruled = 0
        # Sources of the lane that want the scores of their tokens; while there are any, ``sums`` is written.
        self._num_token_scored = 0
        self._attention = AttentionHistory(num_slots, width)
        # [slots]
        self._min_tokens: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self._max_tokens: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        # [slots], see DecodingOptions.
        self._ends_when_cut: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self._num_ending_when_cut = 0
        # [slots], see DecodingOptions; _NO_TOKEN where there is none.
        self._passed_over: NDArray[np.int64] = np.full(num_slots, _NO_TOKEN, np.int64)
        self._num_passing_over = 0

    @abstractmethod
    def needs_log_probs(self, num_slots: int) -> bool:
        """Whether the next step of the first ``num_slots`` slots needs log-probabilities; it may get logits where not."""

    def add(self, slot: int, options: DecodingOptions, source_tokens: int = 0) -> None:
        """Start a source of so many tokens, which need not be told where its attention is not, in a slot that is free."""
        assert options.beam_size == self.width, "a lane holds one beam width"
        assert not options.given_target or self.width == 1, "of a target that is given there is one hypothesis"
        self.next_ids[slot] = self._decoder_start_id
        self.num_tokens[slot] = 0
        self._options[slot] = options
        self._min_tokens[slot] = options.min_target_tokens
        self._max_tokens[slot] = options.max_target_tokens
        self._ends_when_cut[slot] = options.ends_when_cut
        self._num_ending_when_cut += options.ends_when_cut
        self._passed_over[slot] = _NO_TOKEN if options.passed_over_id is None else options.passed_over_id
        self._num_passing_over += options.passed_over_id is not None
        self._rules[slot] = TokenRules(options, self._eos_id, self._decoder_start_id) if options.has_token_rules else None
        self._num_ruled += _is_ruled(options)
        self._num_token_scored += options.return_token_scores
        if options.return_token_scores and self.sums is None:
            self.sums = np.zeros(self.tokens.shape)
        if options.needs_attention:
            self._attention.add(slot, source_tokens)

    def needs_logits(self, num_slots: int) -> bool:
        """Whether the next step of the first ``num_slots`` slots needs the logits of all tokens."""
        if not self._num_ruled:
            return False
        are_ruled = any(rules is not None for rules in self._rules[:num_slots])
        return are_ruled or any(options.given_target for options in self._options[:num_slots])

    @property
    def needs_attention(self) -> bool:
        """Whether the next step needs to tell what the rows attend to."""
        return self._attention.is_wanted

    def advance(
        self,
        num_slots: int,
        candidate_ids: NDArray[np.int64],
        candidate_log_probs: NDArray[np.float32],
        logits: NDArray[np.float32] | None = None,
        attention: NDArray[np.float32] | None = None,
    ) -> Advance:
        """Take one more token in each of the slots 0 to num_slots - 1.

        Args:
            num_slots: slots in use.
            candidate_ids: [num_slots, W, K], each row's most probable next tokens, best first. May be written to.
            candidate_log_probs: [num_slots, W, K], the logarithm of their probability among all tokens that may be decoded, or
                else their logits; see ``needs_log_probs``. May be written to.
            logits: [num_slots, W, V]; see ``needs_logits``.
            attention: [num_slots, W, S], 0 beyond a source; see ``needs_attention``.
        """
        if self._attention.is_wanted:
            assert attention is not None
            self._attention.record(attention, self.num_tokens[:num_slots, 0])
        if self._num_passing_over:
            self._pass_over(candidate_ids, candidate_log_probs)
        if self._num_ruled:
            self._apply_rules(num_slots, candidate_ids, candidate_log_probs, logits)
        if self._num_ending_when_cut:
            self._end_what_is_cut(num_slots, candidate_ids, candidate_log_probs)
        return self._advance(num_slots, candidate_ids, candidate_log_probs)

    @abstractmethod
    def _advance(self, num_slots: int, candidate_ids: NDArray[np.int64], candidate_log_probs: NDArray[np.float32]) -> Advance:
        """See ``advance``; what options ask of single tokens is in the candidates already."""

    def _pass_over(self, ids: NDArray[np.int64], log_probs: NDArray[np.float32]) -> None:
        """Put the token that a source passes over behind its other candidates, as no continuation."""
        is_passed_over = ids == self._passed_over[: len(ids), None, None]
        if is_passed_over.any():
            log_probs[is_passed_over] = -np.inf
            order = np.argsort(is_passed_over, axis=2, kind="stable")
            ids[:] = np.take_along_axis(ids, order, axis=2)
            log_probs[:] = np.take_along_axis(log_probs, order, axis=2)

    def _apply_rules(
        self, num_slots: int, ids: NDArray[np.int64], log_probs: NDArray[np.float32], logits: NDArray[np.float32] | None
    ) -> None:
        """Put the candidates that each source's own rules leave in the place of the model's."""
        for slot in range(num_slots):
            options, rules, position = self._options[slot], self._rules[slot], int(self.num_tokens[slot, 0])
            if position < len(options.target_prefix):
                # One continuation, of the first row: what the other rows have is no better than anything.
                log_probs[slot] = -np.inf
                ids[slot, 0, 0], log_probs[slot, 0, 0] = options.target_prefix[position], 0.0
            elif options.given_target:
                assert logits is not None
                self._give(options.given_target[position - len(options.target_prefix)], ids[slot], log_probs[slot], logits[slot])
            elif rules is not None:
                assert logits is not None
                for row in range(self.width):
                    decoded = self.tokens[slot, row, :position].tolist()
                    ids[slot, row], log_probs[slot, row] = rules.candidates(logits[slot, row], decoded, ids.shape[2])

    @staticmethod
    def _give(token: int, ids: NDArray[np.int64], log_probs: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
        """Put a token of a target that is given in the place of the best candidate of its only row.

        All log-probabilities of a row are as far below its logits as the best candidate's is, so that the graph's own sum over
        the vocabulary serves here too.

        Args:
            token: which.
            ids: [1, K], of the candidates.
            log_probs: [1, K].
            logits: [1, V].
        """
        best = ids[0, 0]
        log_probs[0, 0] = float(log_probs[0, 0]) + (float(logits[0, token]) - float(logits[0, best]))
        ids[0, 0] = token

    def _end_what_is_cut(self, num_slots: int, ids: NDArray[np.int64], log_probs: NDArray[np.float32]) -> None:
        """Leave the end-of-sentence token alone to hypotheses whose last token this is, where that is how they are cut."""
        is_last = self.num_tokens[:num_slots, 0] + 1 >= self._max_tokens[:num_slots]
        if len(slots := np.flatnonzero(is_last & self._ends_when_cut[:num_slots])):
            log_probs[slots] = -np.inf
            ids[slots, :, 0], log_probs[slots, :, 0] = self._eos_id, 0.0
            # However short that is.
            self._min_tokens[slots] = 0

    def _reason(self, slot: int, last_token: int, length: int) -> FinishReason:
        """Why a hypothesis of ``length`` tokens ended; one that was cut did not end by itself, whatever its last token is."""
        has_ended = last_token in self._end_ids(slot) and not self._is_cut(slot, length)
        return FinishReason.EOS if has_ended else FinishReason.LENGTH

    def _end_ids(self, slot: int) -> tuple[int, ...]:
        """The tokens that end a source's hypotheses."""
        return self._options[slot].end_ids or (self._eos_id,)

    def _is_cut(self, slot: int, length: int) -> bool:
        """Whether a hypothesis of ``length`` tokens has the end-of-sentence token because it was cut there."""
        return bool(self._ends_when_cut[slot]) and length >= self._max_tokens[slot]

    def _is_returned(self, slot: int, last_token: int, length: int) -> bool:
        """Whether the last of a hypothesis' ``length`` tokens is part of it."""
        if self._is_cut(slot, length):
            return False
        is_wanted = self._options[slot].return_end_token and last_token != self._eos_id
        return is_wanted or last_token not in self._end_ids(slot)

    def _ends(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which next tokens end their hypothesis; ids: [num_slots, ...], of the first slots. No token of a prefix does."""
        ends: NDArray[np.bool_] = ids == self._eos_id
        if self._num_ruled:
            for slot, options in enumerate(self._options[: len(ids)]):
                if options.end_ids:
                    is_free = self.num_tokens[slot, 0] >= len(options.target_prefix)
                    ends[slot] = np.isin(ids[slot], options.end_ids) if is_free else False
        return ends

    @abstractmethod
    def hypotheses(self, slot: int) -> tuple[Hypothesis, ...]:
        """What a finished slot came to: num_hypotheses of them, best first.

        Fewer only if no more sequences are possible; none if the model's probabilities were not numbers.
        """

    @abstractmethod
    def decided(self, slot: int) -> NDArray[np.int32]:
        """The tokens that a slot's best hypothesis is sure to start with, for streaming: [how many], never fewer than before."""

    def leave(self, slot: int) -> None:
        """A source is over; its slot is free."""
        self._num_ruled -= _is_ruled(self._options[slot])
        self._rules[slot] = None
        self._num_token_scored -= self._options[slot].return_token_scores
        self._num_ending_when_cut -= self._options[slot].ends_when_cut
        self._num_passing_over -= self._options[slot].passed_over_id is not None
        self._attention.leave(slot)

    def move(self, from_slot: int, to_slot: int) -> None:
        """Move a source into a slot that is free."""
        for array in (
            self.next_ids,
            self.num_tokens,
            self._min_tokens,
            self._max_tokens,
            self._ends_when_cut,
            self._passed_over,
        ):
            array[to_slot] = array[from_slot]
        length = int(self.num_tokens[from_slot, 0])
        self.tokens[to_slot, :, :length] = self.tokens[from_slot, :, :length]
        if self.sums is not None:
            self.sums[to_slot, :, :length] = self.sums[from_slot, :, :length]
        self._options[to_slot] = self._options[from_slot]
        self._rules[to_slot] = self._rules[from_slot]
        self._attention.move(from_slot, to_slot)

    def grow(self, capacity_tokens: int) -> None:
        """Make room for longer targets, as the caches do. ``tokens`` and ``sums`` are new arrays."""
        self.tokens = _longer(self.tokens, capacity_tokens)
        if self.sums is not None:
            self.sums = _longer(self.sums, capacity_tokens)

    def _score(self, slot: int, row: int, length: int, total: float) -> float:
        """What a hypothesis of ``length`` tokens is worth, whose log-probability is ``total``; all it read is in ``row``."""
        options = self._options[slot]
        score = (total - options.word_penalty * length) / math.pow(length, options.length_penalty)
        if options.coverage_penalty and options.needs_attention:
            score += options.coverage_penalty * self._attention.coverage(slot, row, length)
        return score

    def _target_attention(self, slot: int, row: int, length: int) -> NDArray[np.float32] | None:
        """What each token of an answer of ``length`` tokens attended to, if its source wants it told."""
        options = self._options[slot]
        return self._attention.of(slot, row, options.hidden_prefix_tokens, length) if options.return_attention else None

    def _token_scores(self, slot: int, row: int, length: int, total: float) -> tuple[float, ...] | None:
        """What each token added to a hypothesis, if its source wants to know.

        Args:
            slot: its source.
            row: which held all of its tokens but the last.
            length: its tokens, the last included.
            total: its log-probability.
        """
        options = self._options[slot]
        if not options.return_token_scores:
            return None
        assert self.sums is not None
        sums = [0.0, *self.sums[slot, row, : length - 1].tolist(), total]
        return tuple(after - before for before, after in itertools.pairwise(sums))[options.hidden_prefix_tokens :]


def _longer(array: NDArray[_Number], capacity_tokens: int) -> NDArray[_Number]:
    grown = np.zeros((*array.shape[:2], capacity_tokens), array.dtype)
    grown[:, :, : array.shape[2]] = array
    return grown


def _is_ruled(options: DecodingOptions) -> bool:
    return bool(options.target_prefix) or bool(options.given_target) or options.has_token_rules
