"""A lane: sources of one beam width that step together, one decoder call for all their rows.

Knows which sequence has which slot, and keeps search, caches and the bound decoder in step with each other. Does not know
queues, threads, rpc or what a token means.

Slots 0 .. n-1 are in use. When a source leaves, the last one moves into its slot, so a step never runs a dead row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serving.errors import EngineError
from serving.kv_cache import EncodedSource
from serving.request import Hypothesis, Outcome, Sequence
from serving.runtime import LaneDecoder, ModelSession
from serving.search import make_lane_search

# Positions of a new lane's self-attention cache; it doubles when a target outgrows it.
_FIRST_TARGET_CAPACITY = 16
# An empty lane that holds more in a row gives its memory back.
_USUAL_POSITIONS = 128


@dataclass(slots=True)
class _Running:
    """A sequence that has a slot."""

    sequence: Sequence
    # The clock, and the lane's counters, when it joined.
    joined_at_s: float
    steps_before: int
    rows_before: int
    # Tokens of its target that a stream has been told, or is never told because they are the model's own.
    told: int

    def tell(self, tokens: Iterable[int]) -> None:
        """Hand on tokens that come after those that were told."""
        on_token = self.sequence.on_token
        assert on_token is not None
        for token in tokens:
            on_token(token)
            self.told += 1


class Lane:
    """Sources that step together."""

    def __init__(
        self, session: ModelSession, *, width: int, source_capacity: int, max_rows: int, clock: Callable[[], float]
    ) -> None:
        """An empty lane.

        Args:
            session: whose decoder steps it.
            width: beam width of its sources.
            source_capacity: tokens of the longest source at first; grows when one outgrows it.
            max_rows: rows at most; a lane has max_rows // width slots.
            clock: monotonic seconds.
        """
        num_slots = max_rows // width
        self.width = width
        self._session = session
        self._search = make_lane_search(width, num_slots, session.eos_id, session.decoder_start_id)
        self.cache = session.make_cache(
            num_slots=num_slots, width=width, target_capacity=_FIRST_TARGET_CAPACITY, source_capacity=source_capacity
        )
        self._decoder: LaneDecoder = session.bind(
            self.cache,
            self._search.next_ids,
            self._search.num_tokens,
            min(self._search.num_candidates, session.max_candidates),
        )
        self._clock = clock
        self._running: list[_Running] = []
        # Those of them that have no token yet.
        self._fresh: list[Sequence] = []
        self._num_streaming = 0
        # None of its sequences expires before.
        self.expires_at_s = math.inf
        self._steps = 0
        self._rows_stepped = 0

    @property
    def num_rows(self) -> int:
        """Rows that the next step runs."""
        return len(self._running) * self.width

    @property
    def sequences(self) -> list[Sequence]:
        """Of each slot."""
        return [running.sequence for running in self._running]

    @property
    def fresh(self) -> list[Sequence]:
        """Sequences that have no token yet."""
        return list(self._fresh)

    @property
    def is_large(self) -> bool:
        """Whether its caches outgrew what usual sentences take."""
        return max(self.cache.target_capacity, self.cache.source_capacity) > _USUAL_POSITIONS

    def add(self, sequence: Sequence, encoded: EncodedSource) -> None:
        """Give a source the next slot: encoded is its own, of the session's ``encode``."""
        slot = len(self._running)
        self._make_source_room(len(sequence.source_ids), slot)
        self.cache.write_source(slot, encoded, len(sequence.source_ids))
        self._search.add(slot, sequence.options, len(sequence.source_ids))
        hidden = sequence.options.hidden_prefix_tokens
        self._running.append(_Running(sequence, self._clock(), self._steps, self._rows_stepped, hidden))
        self._fresh.append(sequence)
        self._num_streaming += sequence.on_token is not None
        self.expires_at_s = min(self.expires_at_s, sequence.expires_at_s)

    def step(self, *, alone: bool = False) -> list[tuple[Sequence, Outcome]]:
        """Decode one token of every row; a sequence that is done leaves.

        Args:
            alone: whether the CPUs of other workers are idle.

        Returns:
            The sequences that are done, and what came of them.

        Raises:
            EngineError: the runtime failed; the lane cannot be used any more.
        """
        num_sources = len(self._running)
        longest = self._search.longest(num_sources) + 1
        self._make_room(longest)
        stepped = self._decoder.step(
            num_sources,
            longest,
            log_probs_wanted=self._search.needs_log_probs,
            logits_wanted=self._search.needs_logits,
            attention_wanted=self._search.needs_attention,
            alone=alone,
        )
        advance = self._search.advance(
            num_sources, stepped.candidate_ids, stepped.candidate_log_probs, stepped.logits, stepped.attention
        )
        if advance.forks:
            self.cache.copy_rows(advance.forks)
        self._steps += 1
        self._rows_stepped += num_sources * self.width
        self._fresh.clear()
        hypotheses = {slot: self._search.hypotheses(slot) for slot in advance.finished}
        if self._num_streaming:
            self._tell(hypotheses)
        if not hypotheses:
            return []
        left = self._free(advance.finished)
        return [(sequence, _outcome(sequence, best)) for sequence, best in zip(left, hypotheses.values(), strict=True)]

    def _tell(self, finished: dict[int, tuple[Hypothesis, ...]]) -> None:
        """Tell streams what is decided since the last step: of slots that are finished, the rest of their best hypothesis."""
        for slot, running in enumerate(self._running):
            if running.sequence.on_token is None:
                continue
            if slot not in finished:
                running.tell(self._search.decided(slot)[running.told :])
            elif finished[slot]:
                hidden = running.sequence.options.hidden_prefix_tokens
                running.tell(finished[slot][0].target_ids[running.told - hidden :])

    def drop(self, reason_to_leave: Callable[[Sequence], Exception | None]) -> list[tuple[Sequence, Outcome]]:
        """Take out the sequences that have a reason to leave, in the middle of their decoding."""
        reasons = [reason_to_leave(running.sequence) for running in self._running]
        slots = [slot for slot, reason in enumerate(reasons) if reason is not None]
        left = self._free(slots)
        self.expires_at_s = min((running.sequence.expires_at_s for running in self._running), default=math.inf)
        return [
            (sequence, Outcome(timings=sequence.timings, error=reasons[slot])) for slot, sequence in zip(slots, left, strict=True)
        ]

    def _free(self, slots: list[int]) -> list[Sequence]:
        """Empty the slots, given in ascending order, and close the gaps; returns their sequences in the same order."""
        now_s = self._clock()
        left: list[Sequence] = []
        for slot in reversed(slots):
            running = self._running[slot]
            timings = running.sequence.timings
            timings.decode_s = now_s - running.joined_at_s
            timings.steps = self._steps - running.steps_before
            timings.mean_rows_per_step = (self._rows_stepped - running.rows_before) / max(1, timings.steps)
            left.append(running.sequence)
            self._num_streaming -= running.sequence.on_token is not None
            if running.steps_before == self._steps:
                self._fresh.remove(running.sequence)
            self._search.leave(slot)
            last = len(self._running) - 1
            if slot != last:
                self.cache.move_source(last, slot, self._search.length(last))
                self._search.move(last, slot)
                self._running[slot] = self._running[last]
            self._running.pop()
        return left[::-1]

    def _make_room(self, positions: int) -> None:
        """Grow the self-attention cache when the next step would not fit."""
        if positions > self.cache.target_capacity:
            self.cache.grow_target(2 * self.cache.target_capacity, len(self._running))
            self._decoder.rebind()

    def _make_source_room(self, length: int, num_slots_used: int) -> None:
        """Grow the cross-attention cache when a source would not fit."""
        if length > self.cache.source_capacity:
            self.cache.grow_source(self._session.source_capacity(length), num_slots_used)
            self._decoder.rebind()


def _outcome(sequence: Sequence, hypotheses: tuple[Hypothesis, ...]) -> Outcome:
    """Hypotheses as they are, unless there are none: that is no translation."""
    if not hypotheses:
        return Outcome(timings=sequence.timings, error=EngineError("the model's probabilities are not finite numbers"))
    return Outcome(hypotheses=hypotheses, timings=sequence.timings)
