"""The points of the experiment, and their order: both servers take turns at every load, both are up, one is loaded.

First each server's settings are tuned, by a short trial of each. Then closed loops; then a ladder of rates that both climb, and
bisection for the highest rate that each still serves well. Who goes first alternates. A server that fails at a load is stopped
and left out from there on; what it did before stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.process import one_line
from benchmarks.served.generator import ClosedLoad, OpenLoad
from benchmarks.served.ladder import RateSearch
from benchmarks.served.point import Bench, LoadPoint, Times, line_on, load_name
from benchmarks.served.servers import Knobs, Server, ServerUnavailableError

_MOST_CLIENTS = 64
# Of the best throughput: where tails of two settings are compared.
_TRIAL_LOAD = 0.6
# Settings within this of the best throughput are as good; among them the shorter tail wins.
_AS_GOOD = 0.95
# A ladder goes on above the highest closed-loop throughput by this, in case the open loop bears more.
_HEADROOM = 1.3

# The settings to try of one server, and how to make it with one of them (not started).
Contender = tuple[Sequence[Knobs], Callable[[Knobs], Server]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    clients: tuple[int, ...]
    closed: Times
    open: Times
    # Of one setting; None: the first setting is taken untried.
    trial: Times | None
    # Of the ladder, up to the highest closed-loop throughput.
    rungs: int
    refinements: int
    # Closed loops over the streaming method, by number of clients.
    streamed_clients: tuple[int, ...]


QUICK = Effort(
    clients=(1, 8, 64),
    closed=Times(warmup_s=0.4, duration_s=2.0),
    open=Times(warmup_s=0.4, duration_s=2.5, drain_s=2.0),
    trial=None,
    rungs=3,
    refinements=2,
    streamed_clients=(1,),
)
FULL = Effort(
    clients=(1, 8, 64),
    closed=Times(warmup_s=1.0, duration_s=8.0),
    open=Times(warmup_s=1.0, duration_s=10.0),
    trial=Times(warmup_s=0.5, duration_s=4.0),
    rungs=9,
    refinements=3,
    streamed_clients=(1, 8),
)


def ladder(highest_per_s: float, rungs: int) -> list[float]:
    """Rates in even steps of a round number, about ``rungs`` of them up to ``highest_per_s``, and some above.

    >>> ladder(180, 9)
    [20.0, 40.0, 60.0, 80.0, 100.0, 120.0, 140.0, 160.0, 180.0, 200.0, 220.0]
    """
    step = _round_number(max(highest_per_s, 1.0) / rungs)
    return [step * rung for rung in range(1, max(1, math.floor(_HEADROOM * highest_per_s / step)) + 1)]


def _round_number(value: float) -> float:
    """The 1, 2 or 5 times a power of ten that is nearest in ratio."""
    power = math.floor(math.log10(value))
    return min((factor * 10.0**power for factor in (1, 2, 5, 10)), key=lambda candidate: abs(math.log(candidate / value)))


@dataclass(frozen=True, slots=True)
class Trial:
    """What a setting did in its trial."""

    knobs: Knobs
    throughput_per_s: float
    # At ``_TRIAL_LOAD`` of the best throughput; None where nothing was answered.
    p95_s: float | None


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The setting to take: the shortest tail among those whose throughput is as good as the best."""
    most = max(trial.throughput_per_s for trial in trials)
    fast = [trial for trial in trials if trial.throughput_per_s >= _AS_GOOD * most]
    return min(fast, key=lambda trial: math.inf if trial.p95_s is None else trial.p95_s)


class Sweep:
    """All points of one model."""

    def __init__(self, bench: Bench, effort: Effort, say: Callable[[str], None]) -> None:
        self._bench = bench
        self._effort = effort
        self._say = say
        self.points: list[LoadPoint] = []
        # What was tried and chosen.
        self.notes: list[str] = []
        # Server -> why it did not run.
        self.unavailable: dict[str, str] = {}

    def run(self, beam_size: int, contenders: Sequence[Contender]) -> None:
        """Everything with one beam size; a server that does not start is left out."""
        with ExitStack() as stack:
            servers: list[Server] = []
            for settings, make in contenders:
                try:
                    servers.append(stack.enter_context(make(self._tune(settings, make, beam_size))))
                except ServerUnavailableError as error:
                    self.unavailable[f"{make(settings[0]).name}, beam {beam_size}"] = str(error)
            self._closed_loops(servers, beam_size)
            self._open_loops(servers, beam_size)

    def _tune(self, settings: Sequence[Knobs], make: Callable[[Knobs], Server], beam_size: int) -> Knobs:
        if len(settings) == 1:
            return settings[0]
        if self._effort.trial is None:
            self.notes.append(f"{make(settings[0]).name}, beam {beam_size}, runs with {settings[0]}; nothing was tuned")
            return settings[0]
        with ExitStack() as stack:
            servers = [stack.enter_context(make(knobs)) for knobs in settings]
            closed = [self._trial(server, servers, ClosedLoad(clients=_MOST_CLIENTS), beam_size) for server in servers]
            load = OpenLoad(rate_per_s=max(1.0, _TRIAL_LOAD * max(point.throughput_per_s for point in closed)))
            opened = [self._trial(server, servers, load, beam_size) for server in servers]
        trials = [
            Trial(knobs, at_most.throughput_per_s, at_load.p95_s)
            for knobs, at_most, at_load in zip(settings, closed, opened, strict=True)
        ]
        best = best_trial(trials)
        tried = "; ".join(
            f"{trial.knobs}: {trial.throughput_per_s:.0f}/s, p95 {1e3 * (trial.p95_s or math.inf):.0f} ms" for trial in trials
        )
        self.notes.append(
            f"{servers[0].name}, beam {beam_size}, runs with {best.knobs}; tried, with {_MOST_CLIENTS} clients and then "
            f"at {load.rate_per_s:.0f}/s: {tried}"
        )
        self._say(self.notes[-1])
        return best.knobs

    def _trial(self, server: Server, servers: Sequence[Server], load: ClosedLoad | OpenLoad, beam_size: int) -> LoadPoint:
        assert self._effort.trial is not None
        idle = [other for other in servers if other is not server]
        return self._measure(server, load, self._effort.trial, beam_size=beam_size, idle=idle)

    def _closed_loops(self, servers: list[Server], beam_size: int) -> None:
        for number, clients in enumerate(self._effort.clients):
            for server in in_turn(servers, number):
                self._point(server, servers, ClosedLoad(clients=clients), beam_size)
        if beam_size != 1:
            return
        for clients in self._effort.streamed_clients:
            for server in [one for one in servers if one.wire == "grpc"]:
                self._point(server, servers, ClosedLoad(clients=clients), beam_size, streamed=True)

    def _open_loops(self, servers: list[Server], beam_size: int) -> None:
        throughputs = [p.throughput_per_s for p in self.points if p.beam_size == beam_size and not p.streamed]
        if not throughputs:
            return
        rates = ladder(max(throughputs), self._effort.rungs)
        searches = {
            server: RateSearch(rates=rates, limit_s=self._bench.limit_s, refinements=self._effort.refinements)
            for server in servers
        }
        for server, rate_per_s in turns(searches):
            point = self._point(server, servers, OpenLoad(rate_per_s=rate_per_s), beam_size)
            if point is None:
                del searches[server]
            else:
                searches[server].tell(point.as_rate)

    def _point(
        self,
        server: Server,
        servers: list[Server],
        load: ClosedLoad | OpenLoad,
        beam_size: int,
        *,
        streamed: bool = False,
    ) -> LoadPoint | None:
        """Measure a point; a server that fails is stopped and taken out of ``servers``, and there is none."""
        times = self._effort.closed if isinstance(load, ClosedLoad) else self._effort.open
        idle = [other for other in servers if other is not server]
        try:
            point = self._measure(server, load, times, beam_size=beam_size, streamed=streamed, idle=idle)
        except ServerUnavailableError as error:
            reason = f"{error}; left out from there on"
            self.unavailable[f"{server.name}, beam {beam_size}, {load_name(load, streamed=streamed)}"] = reason
            self._say(f"{server.name}: {reason}")
            servers.remove(server)
            server.stop()
            return None
        self.points.append(point)
        self._say(line_on(point))
        return point

    def _measure(
        self,
        server: Server,
        load: ClosedLoad | OpenLoad,
        times: Times,
        *,
        beam_size: int,
        streamed: bool = False,
        idle: Sequence[Server],
    ) -> LoadPoint:
        try:
            return self._bench.measure(server, load, times, beam_size=beam_size, streamed=streamed, idle=idle)
        except Exception as error:  # the generator's, the metrics page's: whatever fails here has no figures
            raise ServerUnavailableError(one_line(error)) from error


def in_turn(servers: Sequence[Server], number: int) -> list[Server]:
    """The order of a round: every other one goes backwards, so that nobody always comes first."""
    return list(servers) if number % 2 == 0 else list(reversed(servers))


def turns(searches: dict[Server, RateSearch]) -> Iterator[tuple[Server, float]]:
    """Who is to try which rate: one after the other, until nobody has any left.

    Tell the search before asking for the next, or take the server out.
    """
    number = 0
    while any(search.next_rate() is not None for search in searches.values()):
        for server in in_turn(list(searches), number):
            if (rate_per_s := searches[server].next_rate()) is not None:
                yield server, rate_per_s
        number += 1
