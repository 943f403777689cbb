"""What was sent and answered, and the arithmetic over it. Pure: knows no network, process or clock.

Latency counts from the time at which a request was due, not from that at which it was sent: a generator that is held up by a slow
server must not hide the wait ("coordinated omission").
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.results import Measurement

# A request without an answer when the run ended.
UNANSWERED = "unanswered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request; seconds count from the start of the run."""

    # Index of its text.
    text: int
    # When it was to be sent.
    due_s: float
    sent_s: float
    # Of the answer, of the error, or of giving up.
    ended_s: float
    # Of the first piece of a streamed answer.
    first_token_s: float | None = None
    # One of the two.
    answer: str | None = None
    error: str | None = None

    @property
    def latency_s(self) -> float:
        """From the time it was due to its end; of one that was never answered, the least that it can have been."""
        return self.ended_s - self.due_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of a run that counts: what is due, or ends, from its start to its end."""

    starts_s: float
    ends_s: float

    @property
    def length_s(self) -> float:
        """Seconds."""
        return self.ends_s - self.starts_s

    def holds(self, time_s: float) -> bool:
        """Whether a time lies in it."""
        return self.starts_s <= time_s < self.ends_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in figures."""

    # Answers in the window per second, and those of them within the limit.
    throughput_per_s: float
    goodput_per_s: float
    # Of the requests that were due in the window and were answered or given up; None where there is none.
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    # Of streamed answers: from due to the first piece.
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    # From due to sent: how late the generator itself was.
    late_p95_s: float | None
    # Requests due in the window, and what became of those that failed.
    requests: int
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def error_share(self) -> float:
        """Failed requests among all; 0 of none."""
        return sum(self.errors.values()) / self.requests if self.requests else 0.0


def poisson_schedule(rate_per_s: float, duration_s: float, seed: int) -> list[float]:
    """Times of arrival, in seconds from 0 and below ``duration_s``, with exponential gaps of mean 1 / rate.

    Raises:
        ValueError: the rate is not above 0.
    """
    if not rate_per_s > 0:
        raise ValueError(f"a rate must be above 0, not {rate_per_s}")
    rng = random.Random(seed)
    times: list[float] = []
    at_s = rng.expovariate(rate_per_s)
    while at_s < duration_s:
        times.append(at_s)
        at_s += rng.expovariate(rate_per_s)
    return times


def text_order(count: int, seed: int) -> Iterator[int]:
    """Indices of texts without end: all of them in a random order, then all of them in another."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(count), count)


def summarize(samples: Sequence[Sample], window: Window, limit_s: float) -> Summary:
    """Arithmetic over one run.

    Args:
        samples: all of it.
        window: the part that counts; warm-up lies before, the drain after it.
        limit_s: an answer within it is a good one.
    """
    due = [sample for sample in samples if window.holds(sample.due_s)]
    answered = [sample for sample in samples if sample.answer is not None and window.holds(sample.ended_s)]
    # A refusal is fast and no answer: it must not make the percentiles look better.
    latencies = [sample.latency_s for sample in due if sample.error in (None, UNANSWERED)]
    first = [sample.first_token_s - sample.due_s for sample in due if sample.first_token_s is not None]
    return Summary(
        throughput_per_s=len(answered) / window.length_s,
        goodput_per_s=sum(sample.latency_s <= limit_s for sample in answered) / window.length_s,
        p50_s=_percentile(latencies, 50),
        p95_s=_percentile(latencies, 95),
        p99_s=_percentile(latencies, 99),
        first_token_p50_s=_percentile(first, 50),
        first_token_p95_s=_percentile(first, 95),
        late_p95_s=_percentile([sample.sent_s - sample.due_s for sample in due], 95),
        requests=len(due),
        errors=dict(sorted(Counter(sample.error for sample in due if sample.error is not None).items())),
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return Measurement(tuple(values)).percentile(percent) if values else None


def first_answers(samples: Sequence[Sample]) -> dict[int, str]:
    """Text -> its first answer."""
    answers: dict[int, str] = {}
    for sample in samples:
        if sample.answer is not None:
            answers.setdefault(sample.text, sample.answer)
    return answers


def texts_with_several_answers(samples: Sequence[Sample]) -> int:
    """Texts that were answered more than once and not always alike."""
    first = first_answers(samples)
    return len({sample.text for sample in samples if sample.answer is not None and sample.answer != first[sample.text]})
