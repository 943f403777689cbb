from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.served.__main__ import main
from benchmarks.served.steps import StepClock, measure_step
from serving.bundle import Bundle
from serving.errors import EngineError
from serving.runtime import base


def test_the_clock_tells_calls_from_what_is_between_them() -> None:
    times = iter([0.0, 5.0, 9.0, 9.012, 9.0123, 9.0243])
    clock = StepClock(clock=lambda: next(times))
    ran: list[tuple[Any, Any]] = []
    timed = clock.timed(lambda graph, binding: ran.append((graph, binding)))
    for step in range(3):
        timed("graph", step)
    assert ran == [("graph", 0), ("graph", 1), ("graph", 2)]
    cost = clock.cost(rows=32, beam_size=4)
    assert (cost.rows, cost.beam_size, cost.steps) == (32, 4, 2)
    assert cost.graph_ms == pytest.approx(12.0)
    assert cost.python_us == pytest.approx((4e6 + 300) / 2)


def test_nothing_is_said_of_a_single_step() -> None:
    clock = StepClock()
    clock.timed(lambda graph, binding: None)(None, None)
    with pytest.raises(ValueError, match="no two steps"):
        clock.cost(rows=1, beam_size=1)


def test_in_one_line() -> None:
    clock = StepClock(within_s=[9.0, 0.012, 0.012], between_s=[9.0, 0.0002, 0.0002])
    assert str(clock.cost(rows=32, beam_size=1)) == (
        "32 rows, beam 1: 200 us of Python between two decoder calls of 12.0 ms, medians of 2 steps (at most 100 us to reach)"
    )


@pytest.mark.parametrize(("beam_size", "sources"), [(1, 8), (3, 2)])
def test_the_steps_of_a_real_engine(tiny_bundle: Bundle, beam_size: int, sources: int) -> None:
    run_graph = vars(base)["run_graph"]
    cost = measure_step(tiny_bundle, beam_size=beam_size, rows=8, rounds=2)
    assert vars(base)["run_graph"] is run_graph
    assert (cost.rows, cost.beam_size) == (sources * beam_size, beam_size)
    # Twice 32 tokens, and not one after another.
    assert 63 <= cost.steps < 2 * sources * 32
    assert cost.python_us > 0


def test_a_beam_wider_than_the_rows_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="a beam of 4 takes more than 2 rows"):
        measure_step(tiny_bundle, beam_size=4, rows=2)
    result = CliRunner().invoke(main, ["steps", "--rows", "2", "--beam-size", "1", "--beam-size", "4"])
    assert result.exit_code == 2
    assert "--rows: 2 rows have no room for a beam of 4" in result.output


def test_a_step_that_fails_is_told(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: Any, binding: Any) -> None:
        raise EngineError("a graph failed: out of memory")

    monkeypatch.setattr(base, "run_graph", fail)
    with pytest.raises(EngineError, match="out of memory"):
        measure_step(tiny_bundle, beam_size=1, rows=8, rounds=1)
    assert vars(base)["run_graph"] is fail
