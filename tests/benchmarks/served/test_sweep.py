from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError

import pytest

from benchmarks.served.generator import ClosedLoad, OpenLoad
from benchmarks.served.point import Bench, Corpus, LoadPoint, Times, line_on
from benchmarks.served.servers import Counters, Knobs, Server, ServerUnavailableError
from benchmarks.served.sweep import Contender, Effort, Sweep, Trial, best_trial, ladder
from tests.benchmarks.served.support import point

TIMES = Times(warmup_s=0.1, duration_s=1.0)


class FakeServer(Server):
    """Only up or not."""

    def __init__(self, name: str, knobs: Knobs, *, wire: Any, log: list[str], starts: bool = True) -> None:
        super().__init__(knobs)
        self.name, self.wire = name, wire
        self._events, self._starts = log, starts

    def start(self) -> None:
        if not self._starts:
            raise ServerUnavailableError(f"{self.name} ended with status 1: no model")
        self._events.append(f"start {self.name} {self.knobs.batch}")

    def stop(self) -> None:
        self._events.append(f"stop {self.name} {self.knobs.batch}")

    def counters(self) -> Counters:
        return Counters()


class FakeBench(Bench):
    """A server bears a hundred a second, "fast" twice as many, and ten more for each row of its settings."""

    def measure(
        self,
        server: Server,
        load: ClosedLoad | OpenLoad,
        times: Times,
        *,
        beam_size: int,
        streamed: bool = False,
        idle: Sequence[Server] = (),
    ) -> LoadPoint:
        capacity = (200.0 if server.name == "fast" else 100.0) + 10 * server.knobs.batch
        assert server not in idle
        if isinstance(load, ClosedLoad):
            return point(
                server=server.name, beam_size=beam_size, clients=load.clients, streamed=streamed, throughput_per_s=capacity
            )
        over = max(0.0, load.rate_per_s / capacity - 1)
        served = min(capacity, load.rate_per_s)
        return point(
            server=server.name,
            beam_size=beam_size,
            rate_per_s=load.rate_per_s,
            throughput_per_s=served,
            goodput_per_s=0.0 if over else served,
            p95_s=0.1 + 10 * over,
        )


@dataclass(frozen=True, kw_only=True)
class FailingBench(FakeBench):
    """Raises at one server's one load."""

    at: tuple[str, ClosedLoad | OpenLoad]
    error: Exception

    def measure(self, server: Server, load: ClosedLoad | OpenLoad, times: Times, **options: Any) -> LoadPoint:
        if (server.name, load) == self.at and not options.get("streamed"):
            raise self.error
        return super().measure(server, load, times, **options)


def contender(name: str, log: list[str], batches: Sequence[int] = (1,), *, starts: bool = True) -> Contender:
    wire = "grpc" if name == "fast" else "http"
    return [Knobs(batch=b) for b in batches], lambda knobs: FakeServer(name, knobs, wire=wire, log=log, starts=starts)


def effort(**fields: Any) -> Effort:
    given: dict[str, Any] = {
        "clients": (1, 64),
        "closed": TIMES,
        "open": TIMES,
        "trial": None,
        "rungs": 4,
        "refinements": 1,
        "streamed_clients": (1,),
    }
    return Effort(**(given | fields))


def sweep(**fields: Any) -> Sweep:
    return Sweep(FakeBench(model="small", corpus=Corpus(texts=("a",))), effort(**fields), lambda line: None)


def loads(points: Sequence[LoadPoint]) -> list[tuple[str, float]]:
    return [(p.server, p.rate_per_s) for p in points if p.rate_per_s is not None]


def test_servers_take_turns_at_every_load() -> None:
    log: list[str] = []
    one = sweep()
    one.run(1, [contender("fast", log), contender("slow", log)])
    closed = [(p.server, p.clients, p.streamed) for p in one.points if p.rate_per_s is None]
    assert closed == [
        ("fast", 1, False),
        ("slow", 1, False),
        ("slow", 64, False),
        ("fast", 64, False),
        ("fast", 1, True),
    ]
    # 210 a second at best, in four steps of 50. The slow one bears 110 and is refined while the other still climbs.
    assert loads(one.points) == [
        ("fast", 50),
        ("slow", 50),
        ("slow", 100),
        ("fast", 100),
        ("fast", 150),
        ("slow", 150),
        ("slow", 125),
        ("fast", 200),
        ("fast", 250),
        ("fast", 225),
    ]
    assert log == ["start fast 1", "start slow 1", "stop slow 1", "stop fast 1"]
    assert one.unavailable == {}


def test_beams_are_not_streamed() -> None:
    one = sweep()
    one.run(4, [contender("fast", [])])
    assert {(p.beam_size, p.streamed) for p in one.points} == {(4, False)}


def test_a_server_that_does_not_start_is_left_out() -> None:
    one = sweep()
    one.run(1, [contender("fast", []), contender("slow", [], starts=False)])
    assert {p.server for p in one.points} == {"fast"}
    assert one.unavailable == {"slow, beam 1": "slow ended with status 1: no model"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(URLError("refused"), "URLError: <urlopen error refused>", id="its metrics page"),
        pytest.param(RuntimeError("the load\ngenerator failed"), "RuntimeError: the load generator failed", id="the generator"),
        pytest.param(ValueError("no number"), "ValueError: no number", id="what it says"),
    ],
)
@pytest.mark.parametrize(
    ("load", "name", "kept"),
    [
        pytest.param(ClosedLoad(clients=64), "64 clients", ["1 clients"], id="closed loop"),
        pytest.param(
            OpenLoad(rate_per_s=100.0), "100/s offered", ["1 clients", "64 clients", "1 clients, streamed", "50/s"], id="rate"
        ),
    ],
)
def test_a_server_that_fails_at_a_load_is_left_out_from_there_on_and_all_points_stay(
    error: Exception, reason: str, load: ClosedLoad | OpenLoad, name: str, kept: list[str]
) -> None:
    log: list[str] = []
    bench = FailingBench(model="small", corpus=Corpus(texts=("a",)), at=("fast", load), error=error)
    one = Sweep(bench, effort(), lambda line: None)
    one.run(1, [contender("fast", log), contender("slow", log)])
    assert [name_of(p) for p in one.points if p.server == "fast"] == kept
    assert [name_of(p) for p in one.points if p.server == "slow"] == [
        "1 clients",
        "64 clients",
        "50/s",
        "100/s",
        "150/s",
        "125/s",
    ]
    assert one.unavailable == {f"fast, beam 1, {name}": f"{reason}; left out from there on"}
    # At once, and once more with the block that started it.
    assert log == ["start fast 1", "start slow 1", "stop fast 1", "stop slow 1", "stop fast 1"]


def name_of(measured: LoadPoint) -> str:
    if measured.rate_per_s is not None:
        return f"{measured.rate_per_s:g}/s"
    return f"{measured.clients} clients{', streamed' if measured.streamed else ''}"


def test_a_setting_that_fails_in_its_trial_is_the_servers_fault() -> None:
    bench = FailingBench(
        model="small", corpus=Corpus(texts=("a",)), at=("fast", ClosedLoad(clients=64)), error=RuntimeError("no generator")
    )
    one = Sweep(bench, effort(trial=TIMES), lambda _: None)
    one.run(1, [contender("fast", [], batches=(1, 2)), contender("slow", [])])
    assert one.unavailable == {"fast, beam 1": "RuntimeError: no generator"}
    assert {p.server for p in one.points} == {"slow"}


def test_no_server_starts() -> None:
    one = sweep()
    one.run(1, [contender("slow", [], starts=False)])
    assert one.points == []


def test_settings_are_tried_and_the_best_is_taken() -> None:
    log: list[str] = []
    one = sweep(trial=TIMES, clients=(1,), streamed_clients=())
    one.run(1, [contender("slow", log, batches=(1, 5, 2))])
    assert log[-2:] == ["start slow 5", "stop slow 5"]
    (note,) = one.notes
    assert note.startswith(
        "slow, beam 1, runs with 5 rows a worker; tried, with 64 clients and then at 90/s: 1 rows a worker: 110/s"
    )


def test_a_setting_that_does_not_start_is_the_servers_fault() -> None:
    one = sweep(trial=TIMES)
    one.run(1, [contender("slow", [], batches=(1, 2), starts=False)])
    assert set(one.unavailable) == {"slow, beam 1"}


def test_it_is_told_that_nothing_was_tuned() -> None:
    one = sweep(trial=None)
    one.run(1, [contender("slow", [], batches=(4, 5)), contender("fast", [])])
    assert one.notes == ["slow, beam 1, runs with 4 rows a worker; nothing was tuned"]


def test_the_shortest_tail_wins_among_those_that_are_fast() -> None:
    fast, nearly, slow, silent = (
        Trial(Knobs(batch=i), throughput, p95)
        for i, (throughput, p95) in enumerate([(100.0, 0.3), (96.0, 0.2), (80.0, 0.1), (99.0, None)])
    )
    assert best_trial([fast, nearly, slow, silent]) == nearly
    assert best_trial([silent]) == silent


@pytest.mark.parametrize(
    ("highest", "rungs", "expected"),
    [
        (180, 9, [20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220]),
        (90, 9, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110]),
        (25, 3, [10, 20, 30]),
        (0.5, 9, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (0, 1, [1]),
    ],
)
def test_ladders(highest: float, rungs: int, expected: list[float]) -> None:
    assert ladder(highest, rungs) == pytest.approx(expected)


def test_a_line_on_a_point() -> None:
    assert line_on(point(rate_per_s=40.0)) == "onnxlate beam 1, 40/s offered: 100.0/s, good 90.0/s, p50 50 ms, p95 150 ms"
    refused = point(clients=8, streamed=True, p50_s=None, p95_s=None, errors={"INTERNAL": 3})
    assert line_on(refused) == (
        "onnxlate beam 1, 8 clients, streamed: 100.0/s, good 90.0/s, p50 none, p95 none, errors {'INTERNAL': 3}"
    )
