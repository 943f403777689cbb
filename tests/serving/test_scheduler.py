"""Policy, with no threads and a clock that is a number."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import EngineConfig
from serving.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    ShuttingDownError,
)
from serving.request import DecodingOptions, Sequence
from serving.scheduler import Admission, Scheduler, encoder_batches


def sequence(length: int = 4, beam: int = 1, *, arrived: float = 0.0, expires: float = 1e9) -> Sequence:
    return Sequence(
        source_ids=tuple(range(length)),
        options=DecodingOptions(beam_size=beam),
        arrived_at_s=arrived,
        expires_at_s=expires,
        on_outcome=lambda _: None,
    )


SMALL = EngineConfig(threads=1, max_rows_per_worker=8, encoder_batch_tokens=100, max_waiting_sequences=16)


def config(**overrides: Any) -> EngineConfig:
    return replace(SMALL, **overrides)


def test_first_in_first_out() -> None:
    scheduler = Scheduler(config(), 1)
    sequences = [sequence() for _ in range(12)]
    scheduler.submit(sequences[:5])
    scheduler.submit(sequences[5:])
    assert scheduler.take(0, 0.0).admitted == sequences[:8]
    assert scheduler.take(0, 0.0).admitted == []
    scheduler.leave(0, sequences[3], 1.0)
    assert scheduler.take(0, 1.0).admitted == [sequences[8]]
    assert scheduler.num_waiting == 3


def test_a_wide_beam_at_the_head_is_not_overtaken() -> None:
    scheduler = Scheduler(config(), 1)
    running = [sequence() for _ in range(6)]
    scheduler.submit(running)
    scheduler.take(0, 0.0)
    wide, narrow = sequence(beam=4), sequence()
    scheduler.submit([wide])
    scheduler.submit([narrow])
    assert scheduler.take(0, 0.0).admitted == []
    scheduler.leave(0, running[0], 1.0)
    scheduler.leave(0, running[1], 1.0)
    assert scheduler.take(0, 1.0).admitted == [wide]
    scheduler.leave(0, wide, 2.0)
    assert scheduler.take(0, 2.0).admitted == [narrow]


def test_the_worker_with_the_most_room_gets_the_head() -> None:
    scheduler = Scheduler(config(), 2)
    sequences = [sequence() for _ in range(5)]
    scheduler.submit(sequences)
    assert scheduler.take(1, 0.0).admitted == sequences[::2]
    assert scheduler.take(0, 0.0).admitted == sequences[1::2]


def test_a_worker_that_was_handed_some_has_work() -> None:
    scheduler = Scheduler(config(), 2)
    scheduler.submit([sequence(), sequence()])
    scheduler.take(0, 0.0)
    assert not scheduler.has_work(0)
    assert scheduler.has_work(1)
    assert not scheduler.is_idle


def test_one_encoder_budget_is_admitted_at_a_time() -> None:
    scheduler = Scheduler(config(encoder_batch_tokens=10), 1)
    sequences = [sequence(4) for _ in range(4)]
    scheduler.submit(sequences)
    assert scheduler.take(0, 0.0).admitted == sequences[:2]
    assert scheduler.take(0, 0.0).admitted == sequences[2:]


def test_a_source_longer_than_the_budget_goes_alone() -> None:
    scheduler = Scheduler(config(encoder_batch_tokens=10), 1)
    long, short = sequence(50), sequence(4)
    scheduler.submit([long, short])
    assert scheduler.take(0, 0.0).admitted == [long]
    assert scheduler.take(0, 0.0).admitted == [short]


def test_a_full_queue_refuses_the_whole_request() -> None:
    scheduler = Scheduler(config(max_waiting_sequences=3), 1)
    scheduler.submit([sequence(), sequence()])
    with pytest.raises(OverloadedError, match="queue_full") as caught:
        scheduler.submit([sequence(), sequence()])
    assert 0 < caught.value.retry_after_s <= 5
    assert scheduler.num_waiting == 2
    scheduler.submit([sequence()])


def test_too_many_waiting_tokens_are_refused_but_one_request_alone_never() -> None:
    scheduler = Scheduler(config(max_waiting_tokens=10), 1)
    scheduler.submit([sequence(50)])
    with pytest.raises(OverloadedError, match="queue_tokens"):
        scheduler.submit([sequence(1)])
    scheduler.take(0, 0.0)
    scheduler.submit([sequence(9)])


def test_a_beam_wider_than_a_worker_is_refused() -> None:
    scheduler = Scheduler(config(), 1)
    with pytest.raises(InvalidRequestError, match=r"options\.beam_size: 9 is more than the 8 rows"):
        scheduler.submit([sequence(beam=9)])
    assert scheduler.is_idle


def test_draining_refuses_new_ones_and_runs_the_old() -> None:
    scheduler = Scheduler(config(), 1)
    old = sequence()
    scheduler.submit([old])
    scheduler.drain()
    with pytest.raises(ShuttingDownError):
        scheduler.submit([sequence()])
    assert scheduler.take(0, 0.0).admitted == [old]
    scheduler.leave(0, old, 1.0)
    assert scheduler.is_idle


def test_expired_and_cancelled_ones_leave_the_queue_even_when_no_row_is_free() -> None:
    scheduler = Scheduler(config(), 2)
    full = [sequence() for _ in range(16)]
    scheduler.submit(full)
    scheduler.take(0, 0.0)
    scheduler.take(1, 0.0)
    expiring, staying, leaving = sequence(expires=2.0), sequence(), sequence()
    scheduler.submit([expiring, staying, leaving])
    assert scheduler.take(0, 1.0).dropped == []
    scheduler.cancel([leaving])
    dropped = scheduler.take(0, 2.0).dropped
    assert [(s, type(e)) for s, e in dropped] == [(expiring, DeadlineExceededError), (leaving, RequestCancelledError)]
    assert scheduler.num_waiting == 1
    scheduler.leave(1, full[1], 3.0)
    assert scheduler.take(1, 3.0).admitted == [staying]


def test_rows_of_an_assigned_sequence_that_is_cancelled_are_free_again() -> None:
    scheduler = Scheduler(config(max_rows_per_worker=1), 2)
    first, second, third = sequence(), sequence(), sequence()
    scheduler.submit([first, second])
    assert scheduler.take(0, 0.0).admitted == [first]
    scheduler.cancel([second])
    scheduler.submit([third])
    assert scheduler.take(1, 0.0).admitted == [third]


def test_drop_all_empties_the_queue_and_keeps_the_running() -> None:
    scheduler = Scheduler(config(max_rows_per_worker=1), 2)
    sequences = [sequence() for _ in range(3)]
    scheduler.submit(sequences)
    scheduler.take(0, 0.0)
    assert sorted(map(id, scheduler.drop_all())) == sorted(map(id, sequences[1:]))
    assert not scheduler.is_idle
    scheduler.leave(0, sequences[0], 1.0)
    assert scheduler.is_idle


def test_idle_time_says_nothing_of_the_pace() -> None:
    scheduler = Scheduler(config(max_waiting_sequences=4), 1)
    for now in (0.0, 3600.0, 7200.0):
        pair = [sequence(), sequence()]
        scheduler.submit(pair)
        scheduler.take(0, now)
        scheduler.leave(0, pair[0], now)
        scheduler.leave(0, pair[1], now + 0.01)
    scheduler.submit([sequence() for _ in range(4)])
    with pytest.raises(OverloadedError) as caught:
        scheduler.check_room(1)
    assert caught.value.retry_after_s < 0.1


def test_room_is_checked_without_taking_any() -> None:
    scheduler = Scheduler(config(max_waiting_sequences=2), 1)
    scheduler.check_room(2)
    scheduler.check_room(2)
    with pytest.raises(OverloadedError, match="queue_full"):
        scheduler.check_room(3)
    scheduler.submit([])
    scheduler.drain()
    with pytest.raises(ShuttingDownError):
        scheduler.check_room(0)


def test_the_retry_time_follows_the_pace() -> None:
    scheduler = Scheduler(config(max_waiting_sequences=4), 1)
    now = 0.0
    # Something always runs: idle time would not count.
    scheduler.submit([sequence()])
    scheduler.take(0, now)
    for _ in range(200):
        one = sequence()
        scheduler.submit([one])
        scheduler.take(0, now)
        now += 1.0
        scheduler.leave(0, one, now)
    scheduler.submit([sequence() for _ in range(4)])
    with pytest.raises(OverloadedError) as caught:
        scheduler.submit([sequence()])
    assert caught.value.retry_after_s == pytest.approx(2.0, rel=0.05)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["submit", "take", "finish", "cancel"]), st.integers(1, 12), st.integers(1, 8)), max_size=60
    ),
    st.integers(1, 3),
)
def test_never_over_budget_never_starving(events: list[tuple[str, int, int]], workers: int) -> None:
    """Rows stay within every worker's budget, order is first in first out, and everything leaves in the end."""
    scheduler = Scheduler(config(encoder_batch_tokens=12), workers)
    running: list[list[Sequence]] = [[] for _ in range(workers)]
    submitted: list[Sequence] = []
    taken: list[Sequence] = []
    over: list[Sequence] = []

    def take(worker: int) -> None:
        admission = scheduler.take(worker, 0.0)
        running[worker] += admission.admitted
        taken.extend(admission.admitted)
        over.extend(s for s, _ in admission.dropped)
        assert sum(s.num_rows for s in running[worker]) <= 8
        assert len(admission.admitted) < 2 or sum(len(s.source_ids) for s in admission.admitted) <= 12

    def finish(worker: int) -> None:
        if running[worker]:
            over.append(running[worker][0])
            scheduler.leave(worker, running[worker].pop(0), 0.0)

    for kind, length, beam in events:
        worker = (length + beam) % workers
        if kind == "submit":
            one = sequence(length, beam)
            try:
                scheduler.submit([one])
                submitted.append(one)
            except OverloadedError:
                assert scheduler.num_waiting == 16
        elif kind == "take":
            take(worker)
        elif kind == "finish":
            finish(worker)
        elif submitted:
            scheduler.cancel([submitted[length % len(submitted)]])
    for _ in range(200):
        for worker in range(workers):
            take(worker)
            finish(worker)
    assert scheduler.is_idle
    assert sorted(map(id, over)) == sorted(map(id, submitted))
    order = {id(s): i for i, s in enumerate(submitted)}
    if workers == 1:
        assert [order[id(s)] for s in taken] == sorted(order[id(s)] for s in taken)


def test_encoder_batches_hold_alike_lengths_within_the_budget() -> None:
    lengths = [3, 40, 5, 41, 9, 200, 4, 39, 12]
    batches = encoder_batches([sequence(n) for n in lengths], 90)
    got = [[len(s.source_ids) for s in batch] for batch in batches]
    assert got == [[3, 4, 5, 9], [12], [39, 40], [41], [200]]


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 400))
def test_encoder_batches_lose_nothing_and_pad_little(lengths: list[int], budget: int) -> None:
    sequences = [sequence(n) for n in lengths]
    batches = encoder_batches(sequences, budget)
    assert sorted(id(s) for batch in batches for s in batch) == sorted(map(id, sequences))
    for batch in batches:
        longest, shortest = max(len(s.source_ids) for s in batch), min(len(s.source_ids) for s in batch)
        assert len(batch) == 1 or (longest * len(batch) <= budget and longest <= max(2 * shortest, shortest + 8))


def test_a_long_queue_refills_several_rows_at_once() -> None:
    scheduler = Scheduler(config(max_rows_per_worker=16, max_waiting_sequences=64), 1)
    sequences = [sequence(length=1) for _ in range(21)]
    scheduler.submit(sequences)
    assert scheduler.take(0, 0.0).admitted == sequences[:16]
    scheduler.leave(0, sequences[0], 1.0)
    assert scheduler.take(0, 1.0).admitted == []  # one row of sixteen is not an eighth of them
    scheduler.leave(0, sequences[1], 1.0)
    assert scheduler.take(0, 1.0).admitted == sequences[16:18]


def test_a_short_queue_takes_every_free_row() -> None:
    scheduler = Scheduler(config(max_rows_per_worker=16, max_waiting_sequences=64), 1)
    sequences = [sequence(length=1) for _ in range(18)]
    scheduler.submit(sequences)
    assert scheduler.take(0, 0.0).admitted == sequences[:16]
    scheduler.leave(0, sequences[0], 1.0)
    assert scheduler.take(0, 1.0).admitted == sequences[16:17]


def test_what_goes_on_with_an_admitted_request_is_taken_whatever_else() -> None:
    scheduler = Scheduler(config(max_waiting_sequences=1, max_waiting_tokens=4), 1)
    scheduler.submit([sequence()])
    with pytest.raises(OverloadedError):
        scheduler.submit([sequence()])
    scheduler.drain()
    with pytest.raises(ShuttingDownError):
        scheduler.submit([sequence()])
    following = [sequence(), sequence()]
    scheduler.submit(following, continued=True)
    assert scheduler.num_waiting == 3
    assert scheduler.take(0, 0.0).admitted[1:] == following


def test_a_worker_whose_rows_just_go_on_needs_no_admission() -> None:
    scheduler = Scheduler(config(), 2)
    first, second = sequence(), sequence()
    scheduler.submit([first])
    assert scheduler.go_on(0) is None, "somebody waits"
    scheduler.take(0, 0.0)
    assert scheduler.go_on(0) == Admission(alone=True)
    scheduler.submit([second])
    scheduler.take(0, 0.0)
    assert scheduler.go_on(1) is None, "one is assigned to it"
    assert scheduler.take(1, 0.0).admitted == [second]
    assert scheduler.go_on(0) == Admission(alone=False)
    scheduler.leave(1, second, 1.0)
    assert scheduler.go_on(0) == Admission(alone=True)


def test_every_worker_is_told_once_that_some_were_cancelled() -> None:
    scheduler = Scheduler(config(), 2)
    running = [sequence(), sequence()]
    scheduler.submit(running)
    assert [scheduler.take(worker, 0.0).admitted for worker in range(2)] == [[running[0]], [running[1]]]
    scheduler.cancel(running[:1])
    assert [scheduler.go_on(worker) for worker in range(2)] == [None, None]
    assert [scheduler.take(worker, 0.0).cancelled_some for worker in range(2)] == [True, True]
    assert [scheduler.take(worker, 0.0).cancelled_some for worker in range(2)] == [False, False]
    assert scheduler.go_on(0) == Admission(alone=False)
