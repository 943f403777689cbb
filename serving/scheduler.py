"""Who waits, who is admitted to which worker, who is turned away. Pure policy.

Knows sequences, rows, token budgets and times that are handed in. Does not know threads, arrays, graphs or rpc: the engine
calls it under one lock, but for ``go_on``.

Strictly first in, first out: the head of the queue is admitted when the worker with the most room has room for it, and
nobody overtakes it. So the oldest is never starved, and a wide beam is not passed by narrow ones for ever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

from serving.config import EngineConfig
from serving.errors import DeadlineExceededError, InvalidRequestError, OverloadedError, RequestCancelledError, ShuttingDownError
from serving.request import Sequence

_SHORTEST_RETRY_S = 0.05
_LONGEST_RETRY_S = 5.0
# With a long queue, this part of a worker's rows is let run dry before it is filled again.
_REFILL_PARTS = 8
# Weight of the newest completion in the mean time between completions.
_RATE_SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class Admission:
    """What a worker is told to do before its next step."""

    # To be encoded now, oldest first.
    admitted: list[Sequence] = field(default_factory=list)
    # Left the queue without being run, and why.
    dropped: list[tuple[Sequence, Exception]] = field(default_factory=list)
    # Whether no other worker has anything to do now.
    alone: bool = False
    # Whether some sequence was cancelled since this worker was last told what to do.
    cancelled_some: bool = False


# What a worker is told most of the time; nobody writes to them.
_GO_ON = Admission()
_GO_ON_ALONE = Admission(alone=True)


class Scheduler:
    """The waiting queue and every worker's load."""

    def __init__(self, config: EngineConfig, num_workers: int) -> None:
        self._config = config
        self._waiting: deque[Sequence] = deque()
        self._waiting_tokens = 0
        # Handed to a worker that has not asked for them yet; at most what its free rows hold.
        self._assigned: list[deque[Sequence]] = [deque() for _ in range(num_workers)]
        # Rows running or assigned, of each worker.
        self._rows = [0] * num_workers
        self._running = 0
        self._draining = False
        # When the queue has to be looked through for sequences that are over.
        self._earliest_expiry_s = math.inf
        self._cancelled_some = False
        # Of each worker, whether it has to look through its rows for such as were cancelled.
        self._cancelled_since = [False] * num_workers
        self._completion_interval_s = 0.0
        self._last_completion_s: float | None = None

    @property
    def num_waiting(self) -> int:
        """Sequences that no worker has taken yet."""
        return len(self._waiting) + sum(map(len, self._assigned))

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return self._running == 0 and self.num_waiting == 0

    def has_work(self, worker: int) -> bool:
        """Whether ``take`` could hand this worker something."""
        return bool(self._waiting or self._assigned[worker])

    def go_on(self, worker: int) -> Admission | None:
        """What ``take`` would return where it has nothing to say but that the worker's rows go on; None where it may have more.

        Nothing is changed, and nothing that is read is out of date for longer than a step: no lock is needed.
        """
        if self.has_work(worker) or self._cancelled_since[worker]:
            return None
        return _GO_ON_ALONE if self._is_alone(worker) else _GO_ON

    def _is_alone(self, worker: int) -> bool:
        return sum(self._rows) == self._rows[worker]

    def check_room(self, num_sequences: int) -> None:
        """Whether so many sequences could be queued now, for who would rather know before preparing them.

        Raises:
            ShuttingDownError: draining.
            OverloadedError: the queue has no room for so many; says when to try again.
        """
        if self._draining:
            raise ShuttingDownError("the server is shutting down")
        if self.num_waiting + num_sequences > self._config.max_waiting_sequences:
            raise OverloadedError("queue_full", self._retry_after_s())

    def submit(self, sequences: AbstractSequence[Sequence], *, continued: bool = False) -> None:
        """Queue all of a request's sequences, or none.

        Args:
            sequences: of one request.
            continued: they go on with one that was admitted, and are taken while it drains and where the queue is full.

        Raises:
            ShuttingDownError: draining.
            InvalidRequestError: a beam is wider than a worker.
            OverloadedError: they do not fit into the queue; says when to try again.
        """
        if not continued:
            self.check_room(len(sequences))
        widest = max((s.num_rows for s in sequences), default=0)
        if widest > self._config.max_rows_per_worker:
            raise InvalidRequestError(
                "options.beam_size", f"{widest} is more than the {self._config.max_rows_per_worker} rows of a worker"
            )
        tokens = sum(len(s.source_ids) for s in sequences)
        # A request alone in the queue is always taken: it is within the limits of one request.
        if not continued and self._waiting_tokens and self._waiting_tokens + tokens > self._config.max_waiting_tokens:
            raise OverloadedError("queue_tokens", self._retry_after_s())
        self._waiting.extend(sequences)
        self._waiting_tokens += tokens
        self._earliest_expiry_s = min([self._earliest_expiry_s, *(s.expires_at_s for s in sequences)])

    def cancel(self, sequences: AbstractSequence[Sequence]) -> None:
        """Nobody waits for these any more; they leave the queue, or their rows, at the next step."""
        for sequence in sequences:
            sequence.cancelled = True
        self._cancelled_some = True
        self._cancelled_since = [True] * len(self._cancelled_since)

    def take(self, worker: int, now_s: float) -> Admission:
        """What this worker encodes before its next step; their rows count as its own until ``leave``.

        Admits up to its free rows and one encoder budget of tokens, so that running rows wait for no more than that.
        """
        dropped: list[tuple[Sequence, Exception]] = []
        self._drop_dead(dropped, now_s)
        self._assign(worker)
        admission = Admission(dropped=dropped, alone=self._is_alone(worker), cancelled_some=self._cancelled_since[worker])
        self._cancelled_since[worker] = False
        budget = self._config.encoder_batch_tokens
        mine = self._assigned[worker]
        while mine and (not admission.admitted or len(mine[0].source_ids) <= budget):
            sequence = mine.popleft()
            budget -= len(sequence.source_ids)
            self._waiting_tokens -= len(sequence.source_ids)
            self._running += 1
            admission.admitted.append(sequence)
        return admission

    def leave(self, worker: int, sequence: Sequence, now_s: float) -> None:
        """A sequence that this worker had taken is over; its rows are free."""
        self._rows[worker] -= sequence.num_rows
        self._running -= 1
        if self._last_completion_s is not None:
            interval = now_s - self._last_completion_s
            self._completion_interval_s += _RATE_SMOOTHING * (interval - self._completion_interval_s)
        # Time in which there is nothing to do says nothing of the pace.
        self._last_completion_s = None if self.is_idle else now_s

    def drain(self) -> None:
        """Admit no new sequences; those that wait still run."""
        self._draining = True

    def drop_all(self) -> list[Sequence]:
        """Empty the queue; for an engine that stops at once."""
        dropped = [*self._waiting, *(s for queue in self._assigned for s in queue)]
        for worker, queue in enumerate(self._assigned):
            self._rows[worker] -= sum(s.num_rows for s in queue)
            queue.clear()
        self._waiting.clear()
        self._waiting_tokens = 0
        return dropped

    def _assign(self, asking: int) -> None:
        """Hand the head of the queue to the worker with the most room, again and again; of equals, to the one that asks."""
        if not self._waiting:
            return
        room = self._config.max_rows_per_worker
        # With more waiting than that, a few free rows are left free until several sources can be encoded together: one by one
        # costs an encoder half as much again for each.
        refill = room // _REFILL_PARTS
        if room - refill < min(self._rows) and self._more_rows_wait_than(refill):
            return
        while self._waiting:
            worker = min(range(len(self._rows)), key=lambda w: (self._rows[w], w != asking, w))
            rows = self._waiting[0].num_rows
            if self._rows[worker] + rows > room:
                return
            self._rows[worker] += rows
            self._assigned[worker].append(self._waiting.popleft())

    def _more_rows_wait_than(self, rows: int) -> bool:
        for sequence in self._waiting:
            rows -= sequence.num_rows
            if rows < 0:
                return True
        return False

    def _drop_dead(self, dropped: list[tuple[Sequence, Exception]], now_s: float) -> None:
        """Take out what was cancelled or has expired while it waited."""
        if not self._cancelled_some and now_s < self._earliest_expiry_s:
            return
        self._cancelled_some = False
        self._waiting = self._alive(self._waiting, dropped, now_s)
        for worker, queue in enumerate(self._assigned):
            kept = self._assigned[worker] = self._alive(queue, dropped, now_s)
            self._rows[worker] -= sum(s.num_rows for s in queue) - sum(s.num_rows for s in kept)
        self._waiting_tokens -= sum(len(s.source_ids) for s, _ in dropped)
        left = [s.expires_at_s for queue in (self._waiting, *self._assigned) for s in queue]
        self._earliest_expiry_s = min(left, default=math.inf)

    @staticmethod
    def _alive(queue: deque[Sequence], dropped: list[tuple[Sequence, Exception]], now_s: float) -> deque[Sequence]:
        alive: deque[Sequence] = deque()
        for sequence in queue:
            error = reason_to_leave(sequence, now_s)
            if error is None:
                alive.append(sequence)
            else:
                dropped.append((sequence, error))
        return alive

    def _retry_after_s(self) -> float:
        """About how long half of the queue takes at the pace of late."""
        estimate = self.num_waiting / 2 * self._completion_interval_s
        return min(max(estimate, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)


def reason_to_leave(sequence: Sequence, now_s: float) -> Exception | None:
    """Why a sequence must not go on, or None."""
    if sequence.cancelled:
        return RequestCancelledError("the request was cancelled")
    if sequence.expires_at_s <= now_s:
        return DeadlineExceededError("the request's deadline passed before its translation was ready")
    return None


def encoder_batches(sequences: AbstractSequence[Sequence], budget_tokens: int) -> list[list[Sequence]]:
    """Group sequences into encoder batches of alike lengths.

    Args:
        sequences: what is to be encoded.
        budget_tokens: padded tokens of a batch at most; a longer single source goes alone.

    Returns:
        Batches in order of length. Within a batch the shortest is at least half as long as the longest (or of at most
        eight tokens less), so that padding never costs more than the sources themselves.
    """
    batches: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.source_ids)):
        length = len(sequence.source_ids)
        if batches:
            shortest = len(batches[-1][0].source_ids)
            if (len(batches[-1]) + 1) * length <= budget_tokens and length <= max(2 * shortest, shortest + 8):
                batches[-1].append(sequence)
                continue
        batches.append([sequence])
    return batches
