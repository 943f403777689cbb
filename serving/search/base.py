"""What every search of a lane has in common: its contract, and the state that the decoder step reads.

Knows slots, rows and options; does not know how a token is chosen.

What a step decides is a few comparisons of a few numbers for each source, and between two steps the model's weights have gone
through every cache of the processor: code and data come from memory. So a source is a plain object, a step is one loop over them,
and what every step reads and writes of arrays goes number by number, through memoryviews. An array function over all sources
takes less time where it runs again and again; here each is another cold piece of code, and costs 10 to 40 us a step.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.request import DecodingOptions, FinishReason, Hypothesis
from serving.search.attention import AttentionHistory
from serving.search.rules import TokenRules


class Fork(NamedTuple):
    """A hypothesis goes on in a second row: copy its cached positions there. Rows are ``slot * width + beam``."""

    from_row: int
    to_row: int
    # Positions [start, stop) are copied; before start the two rows hold the same already.
    start: int
    stop: int


class Advance(NamedTuple):
    """What a step led to."""

    # Slots that are done, ascending. They are the caller's to free.
    finished: list[int]
    # Of the slots that go on. No row is written by one and read or written by another, so that their order is free.
    forks: list[Fork]


@dataclass(slots=True, kw_only=True)
class Source:
    """A source that is searched for, and what its rows hold.

    What becomes of it depends on its own candidates and options alone, to the last bit.
    """

    options: DecodingOptions
    eos_id: int
    rules: TokenRules | None
    # [W][length], the tokens decoded so far by each row, the start token not among them; any in a row that holds no hypothesis.
    tokens: list[list[int]]
    # [W], the log-probability of each row's tokens; minus infinity where a row holds no hypothesis.
    totals: list[float]
    # [W][length], the log-probability of each row's tokens up to each one; None: nobody wants it told.
    sums: list[list[float]] | None
    attention: AttentionHistory | None
    # Tokens decoded so far, which is the position of the token to be read next; the same for all rows.
    length: int = 0

    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end its hypotheses now; those that its options name count after the prefix only."""
        options = self.options
        if not options.end_ids:
            return (self.eos_id,)
        return options.end_ids if self.length >= len(options.target_prefix) else ()

    def is_too_early(self) -> bool:
        """Whether an end would come too early now; where a hypothesis is cut it does not."""
        return self.length < self.options.min_target_tokens and not self.is_cut(self.length + 1)

    def is_adjusted(self) -> bool:
        """Whether what may come next is not the model's to say, or not alone: see ``_adjust``."""
        options = self.options
        is_told = self.length < len(options.target_prefix) or bool(options.given_target) or self.is_cut(self.length + 1)
        return is_told or self.rules is not None

    def passed_over_id(self) -> int | None:
        """The token that nothing goes on with now, if there is one: it may be told or wished to be the next, but is not found."""
        if self.options.passed_over_id is None or self.is_adjusted():
            return None
        return self.options.passed_over_id

    def is_cut(self, length: int) -> bool:
        """Whether a hypothesis of ``length`` tokens has the end-of-sentence token because it was cut there."""
        return self.options.ends_when_cut and length >= self.options.max_target_tokens

    def reason(self, last_token: int, length: int) -> FinishReason:
        """Why a hypothesis of ``length`` tokens ended; one that was cut did not end by itself, whatever its last token is."""
        has_ended = self._is_end(last_token) and not self.is_cut(length)
        return FinishReason.EOS if has_ended else FinishReason.LENGTH

    def is_returned(self, last_token: int, length: int) -> bool:
        """Whether the last of a hypothesis' ``length`` tokens is part of it."""
        if self.is_cut(length):
            return False
        is_wanted = self.options.return_end_token and last_token != self.eos_id
        return is_wanted or not self._is_end(last_token)

    def score(self, row: int, length: int, total: float) -> float:
        """What a hypothesis of ``length`` tokens is worth, whose log-probability is ``total``; all it read is in ``row``."""
        options = self.options
        score = (total - options.word_penalty * length) / math.pow(length, options.length_penalty)
        if options.coverage_penalty and self.attention is not None:
            score += options.coverage_penalty * self.attention.coverage(row, length)
        return score

    def target_attention(self, row: int, length: int) -> NDArray[np.float32] | None:
        """What each token of an answer of ``length`` tokens attended to, if somebody wants it told."""
        if not self.options.return_attention or self.attention is None:
            return None
        return self.attention.of(row, self.options.hidden_prefix_tokens, length)

    def token_scores(self, row: int, length: int, total: float) -> tuple[float, ...] | None:
        """What each token added to a hypothesis, if somebody wants to know.

        Args:
            row: which held all of its tokens but the last.
            length: its tokens, the last included.
            total: its log-probability.
        """
        if self.sums is None:
            return None
        sums = [0.0, *self.sums[row][: length - 1], total]
        return tuple(after - before for before, after in itertools.pairwise(sums))[self.options.hidden_prefix_tokens :]

    def _is_end(self, token: int) -> bool:
        return token in (self.options.end_ids or (self.eos_id,))


AnySource = TypeVar("AnySource", bound=Source)


class LaneSearch(ABC, Generic[AnySource]):
    """The search for all sources of a lane, which have one beam width and step together.

    Slots 0 to n-1 are in use. A step of the lane is::

        run the decoder on next_ids and num_tokens of slots 0..n-1
        outcome = search.advance(n, candidate_ids, candidate_log_probs)
        copy outcome.forks in the caches
        take the hypotheses of outcome.finished, then free each such slot: move the last slot into it

    Attributes:
        width: beams of each source, W.
        num_candidates: next tokens of each row that a step hands in, K; fewer only if the vocabulary is smaller (two at least).
        next_ids: int64 [slots, W], what the next decoder step reads. The same array for life: bind it by address.
        num_tokens: int32 [slots, W], tokens decoded so far, which is the position of next_ids; one value for all beams of a
            slot. The same array for life.
    """

    def __init__(self, width: int, num_slots: int, eos_id: int, decoder_start_id: int, *, num_candidates: int) -> None:
        self.width = width
        self.num_candidates = num_candidates
        self.next_ids: NDArray[np.int64] = np.full((num_slots, width), decoder_start_id, np.int64)
        self.num_tokens: NDArray[np.int32] = np.zeros((num_slots, width), np.int32)
        # [slots * W] each, the same memory number by number; see this module's text.
        self._next_id_of_row = self.next_ids.reshape(-1).data
        self._num_tokens_of_row = self.num_tokens.reshape(-1).data
        self._eos_id = eos_id
        self._decoder_start_id = decoder_start_id
        # Stands in every slot that is free, so that nothing of what was there is kept.
        self._nobody = self._start(DecodingOptions(beam_size=width), None)
        self._sources: list[AnySource] = [self._nobody] * num_slots
        # Sources whose candidates may be adjusted, that look at all logits, that want to know what they attend to.
        self._num_adjusted = 0
        self._num_with_logits = 0
        self._num_attending = 0

    @property
    @abstractmethod
    def needs_log_probs(self) -> bool:
        """Whether the next step needs log-probabilities; it may get logits where not."""

    def add(self, slot: int, options: DecodingOptions, source_tokens: int = 0) -> None:
        """Start a source of so many tokens, which need not be told where its attention is not, in a slot that is free."""
        assert options.beam_size == self.width, "a lane holds one beam width"
        assert not options.given_target or self.width == 1, "of a target that is given there is one hypothesis"
        self.next_ids[slot] = self._decoder_start_id
        self.num_tokens[slot] = 0
        self._sources[slot] = self._start(
            options, AttentionHistory(self.width, source_tokens) if options.needs_attention else None
        )
        self._count(options, 1)

    @abstractmethod
    def _start(self, options: DecodingOptions, attention: AttentionHistory | None) -> AnySource:
        """A source that has no token yet."""

    def _rules(self, options: DecodingOptions) -> TokenRules | None:
        return TokenRules(options, self._eos_id, self._decoder_start_id) if options.has_token_rules else None

    def _count(self, options: DecodingOptions, by: int) -> None:
        """A source with these options comes, or leaves."""
        # Adjusted in no step but those of which ``Source.is_adjusted`` says so.
        looks_at_logits = options.has_token_rules or bool(options.given_target)
        self._num_adjusted += by * (looks_at_logits or bool(options.target_prefix) or options.ends_when_cut)
        self._num_with_logits += by * looks_at_logits
        self._num_attending += by * options.needs_attention

    @property
    def needs_logits(self) -> bool:
        """Whether the next step needs the logits of all tokens."""
        return self._num_with_logits > 0

    @property
    def needs_attention(self) -> bool:
        """Whether the next step needs to tell what the rows attend to."""
        return self._num_attending > 0

    def longest(self, num_slots: int) -> int:
        """Tokens of the longest target among the first ``num_slots`` slots."""
        return max([source.length for source in self._sources[:num_slots]])

    def length(self, slot: int) -> int:
        """Tokens of a slot's target so far."""
        return self._sources[slot].length

    def decoded(self, slot: int) -> list[list[int]]:
        """See ``Source.tokens``: [W][length] of a slot, not to be written to."""
        return self._sources[slot].tokens

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
            candidate_ids: [num_slots, W, K], each row's most probable next tokens, best first, which searches rely on. May be
                written to.
            candidate_log_probs: [num_slots, W, K], the logarithm of their probability among all tokens that may be decoded, or
                else their logits; see ``needs_log_probs``. May be written to.
            logits: [num_slots, W, V]; see ``needs_logits``.
            attention: [num_slots, W, S], 0 beyond a source; see ``needs_attention``.
        """
        if self._num_attending:
            assert attention is not None
            for source, attended in zip(self._sources[:num_slots], attention, strict=True):
                if source.attention is not None:
                    source.attention.record(attended, source.length)
        if self._num_adjusted:
            for slot, source in enumerate(self._sources[:num_slots]):
                if source.is_adjusted():
                    _adjust(source, candidate_ids[slot], candidate_log_probs[slot], None if logits is None else logits[slot])
        return self._advance(num_slots, candidate_ids, candidate_log_probs)

    @abstractmethod
    def _advance(self, num_slots: int, candidate_ids: NDArray[np.int64], candidate_log_probs: NDArray[np.float32]) -> Advance:
        """See ``advance``; what options ask of single tokens is in the candidates already."""

    @abstractmethod
    def hypotheses(self, slot: int) -> tuple[Hypothesis, ...]:
        """What a finished slot came to: num_hypotheses of them, best first.

        Fewer only if no more sequences are possible; none if the model's probabilities were not numbers.
        """

    @abstractmethod
    def decided(self, slot: int) -> list[int]:
        """The tokens that a slot's best hypothesis is sure to start with, for streaming: never fewer than before.

        Not to be written to.
        """

    def leave(self, slot: int) -> None:
        """A source is over; its slot is free."""
        self._count(self._sources[slot].options, -1)
        self._sources[slot] = self._nobody

    def move(self, from_slot: int, to_slot: int) -> None:
        """Move a source into a slot that is free; its own is free then."""
        self.next_ids[to_slot] = self.next_ids[from_slot]
        self.num_tokens[to_slot] = self.num_tokens[from_slot]
        self._sources[to_slot], self._sources[from_slot] = self._sources[from_slot], self._nobody


def _adjust(source: Source, ids: NDArray[np.int64], log_probs: NDArray[np.float32], logits: NDArray[np.float32] | None) -> None:
    """Put the candidates that a source's options leave in the place of the model's.

    Args:
        source: whose options.
        ids: [W, K], of the candidates.
        log_probs: [W, K].
        logits: [W, V], where it asked for them.
    """
    options, position = source.options, source.length
    if position < len(options.target_prefix):
        # One continuation, of the first row: what the other rows have is no better than anything.
        log_probs[:] = -np.inf
        ids[0, 0], log_probs[0, 0] = options.target_prefix[position], 0.0
    elif options.given_target:
        assert logits is not None
        _give(options.given_target[position - len(options.target_prefix)], ids, log_probs, logits)
    elif source.rules is not None:
        assert logits is not None
        for row, decoded in enumerate(source.tokens):
            ids[row], log_probs[row] = source.rules.candidates(logits[row], decoded, ids.shape[1])
    if source.is_cut(position + 1):
        # The end-of-sentence token alone.
        log_probs[:] = -np.inf
        ids[:, 0], log_probs[:, 0] = source.eos_id, 0.0


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
