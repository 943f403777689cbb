from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.served.points import (
    UNANSWERED,
    Sample,
    Window,
    first_answers,
    poisson_schedule,
    summarize,
    text_order,
    texts_with_several_answers,
)

WINDOW = Window(starts_s=1.0, ends_s=11.0)


def answered(due_s: float, latency_s: float, *, text: int = 0, answer: str = "ja", late_s: float = 0.0) -> Sample:
    return Sample(text=text, due_s=due_s, sent_s=due_s + late_s, ended_s=due_s + latency_s, answer=answer)


def failed(due_s: float, error: str, latency_s: float = 0.001) -> Sample:
    return Sample(text=0, due_s=due_s, sent_s=due_s, ended_s=due_s + latency_s, error=error)


def test_a_schedule_is_the_same_for_the_same_seed() -> None:
    assert poisson_schedule(50, 10, seed=1) == poisson_schedule(50, 10, seed=1)
    assert poisson_schedule(50, 10, seed=1) != poisson_schedule(50, 10, seed=2)


def test_a_schedule_has_the_rate_and_the_gaps_of_a_poisson_process() -> None:
    times = poisson_schedule(50, 400, seed=3)
    # Five standard deviations of a Poisson count.
    assert abs(len(times) - 20_000) < 5 * math.sqrt(20_000)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    assert min(gaps) >= 0
    assert times[-1] < 400
    # An exponential gap is above its mean with probability 1 / e.
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.02)


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, math.nan])
def test_a_schedule_needs_a_rate(rate_per_s: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        poisson_schedule(rate_per_s, 1, seed=1)


def test_every_text_comes_once_before_any_comes_twice() -> None:
    order = text_order(5, seed=7)
    rounds = [list(itertools.islice(order, 5)) for _ in range(3)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert list(itertools.islice(text_order(5, seed=7), 5)) == rounds[0]


def test_latency_counts_from_the_time_a_request_was_due() -> None:
    # The generator was held up and sent it 3 s late; the server took 0.1 s.
    sample = Sample(text=0, due_s=2.0, sent_s=5.0, ended_s=5.1, answer="ja")
    assert sample.latency_s == pytest.approx(3.1)
    summary = summarize([sample], WINDOW, limit_s=0.2)
    assert summary.p50_s == pytest.approx(3.1)
    assert summary.late_p95_s == pytest.approx(3.0)
    assert summary.goodput_per_s == 0


def test_a_summary_of_answers() -> None:
    # 0.010, 0.020 .. 1.000 s, all due and ended in the window.
    summary = summarize([answered(2.0, i / 100) for i in range(1, 101)], WINDOW, limit_s=0.205)
    assert summary.requests == 100
    assert summary.throughput_per_s == 10.0
    assert summary.goodput_per_s == 2.0
    assert (summary.p50_s, summary.p95_s, summary.p99_s) == pytest.approx((0.505, 0.9505, 0.9901))
    assert summary.errors == {}
    assert summary.error_share == 0


def test_warm_up_and_drain_do_not_count() -> None:
    before, across, late = answered(0.5, 0.1), answered(0.9, 0.4), answered(10.9, 0.5)
    summary = summarize([before, across, late], WINDOW, limit_s=1.0)
    # Ended in the window: the one in the middle. Due in it: the last.
    assert summary.throughput_per_s == pytest.approx(0.1)
    assert summary.requests == 1
    assert summary.p50_s == pytest.approx(0.5)


def test_a_refusal_is_no_fast_answer() -> None:
    summary = summarize([answered(2.0, 0.5), failed(3.0, "RESOURCE_EXHAUSTED"), failed(4.0, "RESOURCE_EXHAUSTED")], WINDOW, 0.2)
    assert summary.p50_s == pytest.approx(0.5)
    assert summary.errors == {"RESOURCE_EXHAUSTED": 2}
    assert summary.error_share == pytest.approx(2 / 3)


def test_a_request_that_was_never_answered_has_at_least_the_time_it_was_waited_for() -> None:
    summary = summarize([answered(2.0, 0.1), failed(3.0, UNANSWERED, 9.0), failed(3.0, UNANSWERED, 9.0)], WINDOW, 0.2)
    assert summary.p50_s == pytest.approx(9.0)
    assert summary.errors == {UNANSWERED: 2}


def test_first_tokens_of_streams() -> None:
    sample = Sample(text=0, due_s=2.0, sent_s=2.0, ended_s=3.0, first_token_s=2.25, answer="ja")
    summary = summarize([sample], WINDOW, 0.2)
    assert (summary.first_token_p50_s, summary.first_token_p95_s) == (0.25, 0.25)


def test_a_run_without_answers() -> None:
    summary = summarize([], WINDOW, 0.2)
    assert (summary.throughput_per_s, summary.goodput_per_s, summary.requests) == (0, 0, 0)
    assert (summary.p50_s, summary.p95_s, summary.late_p95_s, summary.first_token_p50_s) == (None, None, None, None)
    assert summary.error_share == 0


def test_answers_by_text() -> None:
    samples = [
        answered(2, 0.1, text=4, answer="a"),
        answered(3, 0.1, text=4, answer="b"),
        answered(3, 0.1, text=5, answer="c"),
        answered(4, 0.1, text=5, answer="c"),
        failed(5, "INTERNAL"),
    ]
    assert first_answers(samples) == {4: "a", 5: "c"}
    assert texts_with_several_answers(samples) == 1
