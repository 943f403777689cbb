from __future__ import annotations

import pytest

from benchmarks.served.ladder import RateResult, RateSearch, best_of, bounds_of

LIMIT_S = 0.2


def served_at(rate_per_s: float, capacity_per_s: float) -> RateResult:
    """A server that is good up to its capacity and then answers so many, ever later."""
    over = max(0.0, rate_per_s / capacity_per_s - 1)
    return RateResult(
        rate_per_s=rate_per_s,
        throughput_per_s=min(rate_per_s, capacity_per_s),
        goodput_per_s=rate_per_s if not over else capacity_per_s * max(0.0, 1 - 3 * over),
        p95_s=0.1 + 3 * over,
    )


def climb(search: RateSearch, capacity_per_s: float) -> list[float]:
    tried = []
    while (rate_per_s := search.next_rate()) is not None:
        tried.append(rate_per_s)
        search.tell(served_at(rate_per_s, capacity_per_s))
    return tried


def test_a_search_climbs_until_the_server_is_saturated_and_then_halves_the_gap() -> None:
    search = RateSearch(rates=[20, 40, 60, 80, 100, 120, 140], limit_s=LIMIT_S, refinements=3)
    # Good up to 70 and a little above, where p95 passes 0.2 s; past 100 the tail passes a second.
    assert climb(search, 70) == [20, 40, 60, 80, 70, 75, 72.5]


def test_a_search_goes_on_above_the_limit_while_the_server_keeps_up() -> None:
    search = RateSearch(rates=[10, 20, 30, 40], limit_s=LIMIT_S, refinements=1)
    tried = []
    # p95 is over the limit from 30 on, but all that is asked is answered, more of it at each rate.
    for p95_s in (0.1, 0.15, 0.3, 0.4, 0.18):
        rate_per_s = search.next_rate()
        assert rate_per_s is not None
        tried.append(rate_per_s)
        search.tell(RateResult(rate_per_s=rate_per_s, throughput_per_s=rate_per_s, goodput_per_s=rate_per_s, p95_s=p95_s))
    assert search.next_rate() is None
    assert tried == [10, 20, 30, 40, 25]


def test_a_search_stops_where_goodput_falls() -> None:
    search = RateSearch(rates=[10, 20, 30, 40], limit_s=LIMIT_S, refinements=0)
    search.tell(RateResult(rate_per_s=10, throughput_per_s=10, goodput_per_s=10, p95_s=0.1))
    search.tell(RateResult(rate_per_s=20, throughput_per_s=20, goodput_per_s=8, p95_s=0.6))
    assert search.next_rate() is None


def test_a_server_that_is_good_everywhere_needs_no_bisection() -> None:
    search = RateSearch(rates=[20, 40], limit_s=LIMIT_S, refinements=5)
    assert climb(search, 1000) == [20, 40]


def test_a_server_that_is_good_nowhere_is_tried_below_the_ladder() -> None:
    search = RateSearch(rates=[20, 40], limit_s=LIMIT_S, refinements=2)
    assert climb(search, 6) == [20, 10, 5]


def test_a_search_without_refinement() -> None:
    assert climb(RateSearch(rates=[20, 40, 60], limit_s=LIMIT_S, refinements=0), 25) == [20, 40]


@pytest.mark.parametrize("rates", [[], [0, 1], [2, 1], [1, 1]], ids=["none", "zero", "falling", "flat"])
def test_a_ladder_rises(rates: list[float]) -> None:
    with pytest.raises(ValueError, match="must rise from above 0"):
        RateSearch(rates=rates, limit_s=LIMIT_S, refinements=1)


@pytest.mark.parametrize(
    ("fields", "good", "saturated"),
    [
        ({}, True, False),
        ({"p95_s": 0.3}, False, False),
        ({"p95_s": 1.5}, False, True),
        ({"p95_s": None}, False, True),
        ({"error_share": 0.02}, False, True),
        ({"throughput_per_s": 80.0}, True, True),
    ],
    ids=["well", "slow tail", "very slow tail", "no answer", "errors", "behind"],
)
def test_good_and_saturated(fields: dict[str, float | None], good: bool, saturated: bool) -> None:
    base = {"rate_per_s": 100.0, "throughput_per_s": 99.0, "goodput_per_s": 95.0, "p95_s": 0.1}
    result = RateResult(**(base | fields))  # type: ignore[arg-type]  # a literal of the fields' own types
    assert (result.is_good(LIMIT_S), result.is_saturated) == (good, saturated)


def test_the_best_rate_lies_below_every_bad_one() -> None:
    p95_s = {10: 0.1, 20: 0.15, 30: 0.4, 40: 0.12}
    results = [RateResult(rate_per_s=r, throughput_per_s=r, goodput_per_s=r, p95_s=p) for r, p in p95_s.items()]
    assert bounds_of(results, LIMIT_S) == (20, 30)
    best = best_of(results, LIMIT_S)
    assert best is not None
    assert best.rate_per_s == 20
    assert bounds_of(results[2:], LIMIT_S) == (0, 30)
    assert best_of(results[2:], LIMIT_S) is None
    assert bounds_of(results[:2], LIMIT_S) is None
    assert best_of([], LIMIT_S) is None
