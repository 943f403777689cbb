"""Which rates to try, in which order. Pure: is told what came of a rate, says the next.

First a ladder upwards, until the server no longer keeps up; then bisection between the highest rate that was good and the lowest
that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# Above these a server is saturated, and a higher rate tells nothing more.
SATURATED_P95_S = 1.0
# A server that answers less of what is offered than this does not keep up; random arrivals alone stay well above.
_LEAST_ANSWERED = 0.85
# More failures than these are no good service, however fast the rest is.
MOST_ERRORS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RateResult:
    """What came of one rate."""

    rate_per_s: float
    throughput_per_s: float
    goodput_per_s: float
    # None when nothing was answered.
    p95_s: float | None
    error_share: float = 0.0

    def is_good(self, limit_s: float) -> bool:
        """Whether the service is as it should be: p95 within the limit and hardly an error."""
        return self.p95_s is not None and self.p95_s <= limit_s and self.error_share <= MOST_ERRORS

    @property
    def is_saturated(self) -> bool:
        """Whether the server cannot keep up with the rate."""
        if self.p95_s is None or self.p95_s > SATURATED_P95_S or self.error_share > MOST_ERRORS:
            return True
        return self.throughput_per_s < _LEAST_ANSWERED * self.rate_per_s


def bounds_of(results: Sequence[RateResult], limit_s: float) -> tuple[float, float] | None:
    """The highest good rate below every bad one, and the lowest bad one.

    The former is 0 where even the lowest rate was bad; None if none was bad.
    """
    bad = [result.rate_per_s for result in results if not result.is_good(limit_s)]
    if not bad:
        return None
    lowest_bad = min(bad)
    good = [result.rate_per_s for result in results if result.is_good(limit_s) and result.rate_per_s < lowest_bad]
    return max(good, default=0.0), lowest_bad


def best_of(results: Sequence[RateResult], limit_s: float) -> RateResult | None:
    """The result at the highest good rate below every bad one; None where there is none."""
    bounds = bounds_of(results, limit_s)
    good = [r for r in results if r.is_good(limit_s) and (bounds is None or r.rate_per_s < bounds[1])]
    return max(good, key=lambda result: result.rate_per_s, default=None)


@dataclass(slots=True)
class RateSearch:
    """The rates of one server: ask ``next_rate``, try it, ``tell`` what came of it, until there is none."""

    # Ascending.
    rates: Sequence[float]
    # Of p95.
    limit_s: float
    # Steps of bisection after the ladder.
    refinements: int
    _results: list[RateResult] = field(default_factory=list)
    _rung: int = 0
    _refined: int = 0
    _saturated: bool = False

    def __post_init__(self) -> None:
        """Check the ladder.

        Raises:
            ValueError: there is none, or it does not rise.
        """
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise ValueError(f"a ladder of rates must rise from above 0, not {list(self.rates)}")

    def next_rate(self) -> float | None:
        """The rate to try now; None when the search is over."""
        if not self._saturated and self._rung < len(self.rates):
            return self.rates[self._rung]
        bounds = bounds_of(self._results, self.limit_s)
        if self._refined >= self.refinements or bounds is None:
            return None
        good, bad = bounds
        return (good + bad) / 2

    def tell(self, result: RateResult) -> None:
        """What came of the rate that ``next_rate`` named."""
        on_ladder = not self._saturated and self._rung < len(self.rates)
        fell = bool(self._results) and result.goodput_per_s < max(r.goodput_per_s for r in self._results)
        self._results.append(result)
        if on_ladder:
            self._rung += 1
            # Goodput that falls although more is offered is past its top, unless the rate is still served well.
            self._saturated = result.is_saturated or (fell and not result.is_good(self.limit_s))
        else:
            self._refined += 1
