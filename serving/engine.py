"""The decoding engine: workers that take sequences from the scheduler and run them to their end.

Knows threads: each worker is one thread with its own rows, all of them run the same loaded graphs, and one lock guards the
scheduler. Does not know text or rpc; results leave through each sequence's callbacks.

With one thread for each worker's graphs, two workers give 30-40 % more tokens than one worker with two threads. A worker that is
alone has the other CPUs to itself and runs the graphs on all of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AbstractSequence

from serving.bundle import Bundle
from serving.config import EngineConfig
from serving.errors import DeadlineExceededError, EngineError, RequestCancelledError, ShuttingDownError
from serving.lane import Lane
from serving.observer import EngineObserver, NullObserver
from serving.request import Outcome, Sequence
from serving.runtime import ModelSession, open_session, pad_sources
from serving.scheduler import Admission, Scheduler, encoder_batches, reason_to_leave

_log = logging.getLogger(__name__)

# Lanes that a worker keeps although no source is in them, so that the next one like them finds its memory warm.
_EMPTY_LANES_KEPT = 4


class Engine:
    """Runs sequences of any options and any arrival together, on all workers."""

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig | None = None,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the bundle's graphs; ``start`` starts the workers.

        Raises:
            BundleError, ServerStartError: from ``open_session``.
        """
        self._config = config or EngineConfig()
        self._observer = observer or NullObserver()
        self._clock = clock
        num_workers = self._config.num_workers
        session = open_session(
            bundle,
            device=self._config.device,
            # The only worker is always alone.
            threads=self._config.lone_threads if num_workers == 1 else 1,
            lone_threads=self._config.lone_threads,
        )
        self._scheduler = Scheduler(self._config, num_workers)
        # Guards the scheduler and ``_stopping``; notified when either gives a worker something to do. ``Scheduler.go_on``, and a
        # running worker's look at ``_stopping``, need it not.
        self._changed = threading.Condition()
        self._stopping = False
        self._workers = [Worker(self, number, session) for number in range(num_workers)]

    def start(self) -> None:
        """Start the workers."""
        for worker in self._workers:
            worker.thread.start()

    def check_room(self, num_sequences: int) -> None:
        """Whether so many sequences would be admitted now; ``submit`` has the last word.

        Raises:
            ShuttingDownError, OverloadedError: as ``submit``.
        """
        with self._changed:
            self._scheduler.check_room(num_sequences)

    def submit(self, sequences: AbstractSequence[Sequence], *, continued: bool = False) -> None:
        """Queue all of a request's sequences, or none; returns at once.

        Args:
            sequences: of one request.
            continued: they go on with one that was admitted, and are not refused until the engine is closed.

        Raises:
            ShuttingDownError: draining or closed.
            OverloadedError: the queue is full.
            InvalidRequestError: a beam is wider than a worker's rows.
        """
        with self._changed:
            if self._stopping:
                raise ShuttingDownError("the server is shutting down")
            self._scheduler.submit(sequences, continued=continued)
            self._observer.queued(self._scheduler.num_waiting)
            self._changed.notify_all()

    def cancel(self, sequences: AbstractSequence[Sequence]) -> None:
        """Nobody waits for these any more: their rows are free at the next step."""
        with self._changed:
            self._scheduler.cancel(sequences)
            self._changed.notify_all()

    def drain(self) -> None:
        """Admit no more; what was admitted finishes."""
        with self._changed:
            self._scheduler.drain()
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing waits and nothing runs; False when that took longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._scheduler.is_idle, timeout_s)

    def close(self) -> None:
        """Stop the workers after their current step; whatever was left is told ``ShuttingDownError``."""
        with self._changed:
            self._scheduler.drain()
            self._stopping = True
            self._changed.notify_all()
        for worker in self._workers:
            if worker.thread.ident is not None:
                worker.thread.join()
        with self._changed:
            dropped = self._scheduler.drop_all()
        self.deliver_errors((sequence, ShuttingDownError("the server is shutting down")) for sequence in dropped)

    # What follows is for the workers.

    def next_admission(self, worker: Worker) -> Admission | None:
        """Wait until the worker has something to do; returns what it has to encode first, or None when it has to stop."""
        if worker.is_running and not self._stopping and (admission := self._scheduler.go_on(worker.number)) is not None:
            return admission
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or worker.is_running or self._scheduler.has_work(worker.number))
            if self._stopping:
                return None
            admission = self._scheduler.take(worker.number, self._clock())
            if admission.admitted or admission.dropped:
                self._observer.queued(self._scheduler.num_waiting)
                self._changed.notify_all()  # others may have been handed some, or all may be idle now
        self.deliver_errors(admission.dropped)
        return admission

    def deliver(self, worker: Worker, outcomes: AbstractSequence[tuple[Sequence, Outcome]]) -> None:
        """Free the rows of sequences that a worker is done with, then tell whoever waits for them."""
        if not outcomes:
            return
        with self._changed:
            now_s = self._clock()
            for sequence, _ in outcomes:
                self._scheduler.leave(worker.number, sequence, now_s)
            self._changed.notify_all()
        for sequence, outcome in outcomes:
            self._tell(sequence, outcome)

    def deliver_errors(self, failed: Iterable[tuple[Sequence, Exception]]) -> None:
        """Tell those whose sequences no worker ever had."""
        for sequence, error in failed:
            sequence.timings.queue_s = self._clock() - sequence.arrived_at_s
            self._tell(sequence, Outcome(timings=sequence.timings, error=error))

    def _tell(self, sequence: Sequence, outcome: Outcome) -> None:
        best = outcome.hypotheses[0] if outcome.hypotheses else None
        reason = best.finish_reason.value if best else _reason_label(outcome.error)
        self._observer.finished(reason, best.target_tokens if best else 0, outcome.timings.queue_s)
        try:
            sequence.on_outcome(outcome)
        except Exception:  # the caller's fault; the other sequences of this worker have to go on
            _log.exception("a caller's on_outcome failed")

    @property
    def config(self) -> EngineConfig:
        """The engine's options."""
        return self._config

    @property
    def observer(self) -> EngineObserver:
        """Who is told what happens."""
        return self._observer

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds."""
        return self._clock


class Worker:
    """One thread with its own lanes."""

    def __init__(self, engine: Engine, number: int, session: ModelSession) -> None:
        self.number = number
        self.thread = threading.Thread(target=self._run, name=f"onnxlate-worker-{number}", daemon=True)
        self._engine = engine
        self._observer = engine.observer
        self._clock = engine.clock
        self._session = session
        # By (beam width, source bucket), the one used last at the end.
        self._lanes: OrderedDict[tuple[int, int], Lane] = OrderedDict()
        # Taken from the scheduler and not delivered yet.
        self._held: set[Sequence] = set()

    @property
    def is_running(self) -> bool:
        """Whether any row is in use."""
        return any(lane.num_rows for lane in self._lanes.values())

    def _run(self) -> None:
        while (admission := self._engine.next_admission(self)) is not None:
            self._held.update(admission.admitted)
            try:
                self._encode(admission.admitted, alone=admission.alone)
                for lane in [lane for lane in self._lanes.values() if lane.num_rows]:
                    self._drop_dead(lane, cancelled_some=admission.cancelled_some)
                    self._step(lane, alone=admission.alone)
                    if not lane.num_rows:
                        self._forget_empty_lanes()
            except Exception as error:  # nobody foresaw it: what this worker holds is told, and it goes on with nothing
                self._start_over(error)
        self._abandon(ShuttingDownError("the server is shutting down"))

    def _encode(self, admitted: list[Sequence], *, alone: bool) -> None:
        """Encode what was admitted, in batches of alike lengths, and give each source its slot."""
        if not admitted:
            return
        for batch in encoder_batches(admitted, self._engine.config.encoder_batch_tokens):
            started_s = self._clock()
            for sequence in batch:
                sequence.timings.queue_s = started_s - sequence.arrived_at_s
            try:
                source_ids, lengths = pad_sources([s.source_ids for s in batch], self._session.pad_id)
                encoded = self._session.encode(source_ids, lengths, alone=alone)
            except Exception as error:  # of whatever class: this batch is told, and the worker goes on
                self._fail(batch, error)
                continue
            encode_s = self._clock() - started_s
            self._observer.encoded(encode_s, len(batch), sum(len(sequence.source_ids) for sequence in batch))
            for sequence, source in zip(batch, encoded, strict=True):
                sequence.timings.encode_s = encode_s
                self._lane_of(sequence).add(sequence, source)
        self._report_use()

    def _step(self, lane: Lane, *, alone: bool) -> None:
        """One token for every row of a lane; what is done leaves."""
        if not lane.num_rows:
            return
        rows, fresh = lane.num_rows, lane.fresh
        started_s = self._clock()
        try:
            finished = lane.step(alone=alone)
        except Exception as error:  # of whatever class: this lane's caches are in no defined state any more
            self._discard(lane, error)
            return
        now_s = self._clock()
        self._observer.stepped(now_s - started_s, rows)
        for sequence in fresh:
            self._observer.first_token(now_s - sequence.arrived_at_s)
        if finished:
            self._deliver(finished)
            self._report_use()

    def _drop_dead(self, lane: Lane, *, cancelled_some: bool) -> None:
        """Free the rows of sequences that were cancelled or have expired."""
        now_s = self._clock()
        if cancelled_some or lane.expires_at_s <= now_s:
            self._deliver(lane.drop(lambda sequence: reason_to_leave(sequence, now_s)))
            self._report_use()

    def _lane_of(self, sequence: Sequence) -> Lane:
        key = (sequence.num_rows, self._session.source_bucket(len(sequence.source_ids)))
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(
                self._session,
                width=key[0],
                source_capacity=self._session.source_capacity(len(sequence.source_ids)),
                max_rows=self._engine.config.max_rows_per_worker,
                clock=self._clock,
            )
        self._lanes.move_to_end(key)
        return lane

    def _forget_empty_lanes(self) -> None:
        """Keep the memory of a few empty lanes, the last ones used; give back that of the others, and of large ones."""
        empty = [key for key, lane in self._lanes.items() if not lane.num_rows]
        small = [key for key in empty if not self._lanes[key].is_large]
        kept = set(small[-_EMPTY_LANES_KEPT:])
        forgotten = [key for key in empty if key not in kept]
        for key in forgotten:
            del self._lanes[key]
        if forgotten:
            self._report_use()

    def _report_use(self) -> None:
        self._observer.rows_in_use(self.number, sum(lane.num_rows for lane in self._lanes.values()))
        self._observer.cache_bytes(self.number, sum(lane.cache.nbytes for lane in self._lanes.values()))

    def _deliver(self, outcomes: list[tuple[Sequence, Outcome]]) -> None:
        self._held.difference_update(sequence for sequence, _ in outcomes)
        self._engine.deliver(self, outcomes)

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """A graph failed: those that were in it are told, everybody else goes on."""
        _log.error("worker %d: a graph failed", self.number, exc_info=error)
        told = error if isinstance(error, EngineError) else EngineError(f"decoding failed: {error}")
        self._deliver([(s, Outcome(timings=s.timings, error=told)) for s in sequences])

    def _discard(self, lane: Lane, error: Exception) -> None:
        """A lane whose step failed has caches in no defined state; the next source like its own gets a new one."""
        self._lanes = OrderedDict((key, other) for key, other in self._lanes.items() if other is not lane)
        self._fail(lane.sequences, error)
        self._report_use()

    def _start_over(self, error: Exception) -> None:
        """Give up everything that this worker holds, in whatever state it is."""
        self._lanes.clear()
        self._fail(list(self._held), error)
        self._report_use()

    def _abandon(self, error: Exception) -> None:
        """The engine stops at once."""
        for lane in self._lanes.values():
            self._deliver(lane.drop(lambda _: error))


def _reason_label(error: Exception | None) -> str:
    """A bounded label for why a sequence ended without a hypothesis."""
    match error:
        case RequestCancelledError():
            return "cancelled"
        case DeadlineExceededError():
            return "expired"
        case _:
            return "error"
