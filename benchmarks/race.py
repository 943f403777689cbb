"""Several peers on the same jobs, in turns: A B A B, until there is enough of each.

Knows turns and repetitions; does not know what the jobs are for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from benchmarks.peers.base import Answer, Job, PeerSpec, Split
from benchmarks.process import PeerProcess, PeerUnavailableError

# Some libraries' threads spin for up to 0.2 s after their last work (OpenMP's default); the next one's turn starts after that.
_SETTLE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How often a cell is repeated."""

    # Of the fastest peer, all repetitions together, before it is enough.
    min_seconds: float
    min_rounds: int
    max_rounds: int


QUICK = Effort(min_seconds=0.6, min_rounds=2, max_rounds=2)
FULL = Effort(min_seconds=2.0, min_rounds=3, max_rounds=9)


def rounds_for(fastest_s: float, effort: Effort) -> int:
    """How often everyone has a turn, when the fastest needs ``fastest_s`` for one."""
    return max(effort.min_rounds, min(effort.max_rounds, math.ceil(effort.min_seconds / max(fastest_s, 1e-6))))


@dataclass(frozen=True, slots=True)
class Lane:
    """One peer with one split and one choice of kernels."""

    process: PeerProcess

    @property
    def peer(self) -> str:
        """A key of ``benchmarks.peers.PEERS``."""
        return self.process.spec.peer

    @property
    def split(self) -> Split:
        """How it uses the CPUs."""
        return self.process.spec.split

    @property
    def kernels(self) -> str:
        """Empty where there is nothing to choose."""
        return self.process.spec.kernels

    @property
    def settles(self) -> bool:
        """Whether its threads may still spin when it has answered."""
        return max(self.split.threads, self.split.threads_when_alone or 1) > 1

    @property
    def name(self) -> str:
        """Among those of its peer."""
        return f"{self.split}, {self.kernels}" if self.kernels else str(self.split)

    def __str__(self) -> str:
        return f"{self.peer} ({self.name})"


@dataclass(slots=True)
class Field:
    """The lanes that take part, and why others do not."""

    lanes: list[Lane] = field(default_factory=list)
    # Of a peer that takes part otherwise.
    never_started: list[Lane] = field(default_factory=list)
    # Peer or lane -> the reason, in one line.
    unavailable: dict[str, str] = field(default_factory=dict)


@contextmanager
def opened(specs: Mapping[str, Callable[[], list[PeerSpec]]]) -> Iterator[Field]:
    """Start every peer's processes; ends them with the block.

    Args:
        specs: peer -> what makes its specs; it may raise ``PeerUnavailableError``, as a start may.
    """
    found = Field()
    with ExitStack() as stack:
        for peer, make in specs.items():
            try:
                lanes = [Lane(PeerProcess(spec)) for spec in make()]
            except PeerUnavailableError as error:
                found.unavailable[peer] = str(error)
                continue
            for lane in lanes:
                stack.callback(lane.process.close)
                try:
                    lane.process.start()
                    found.lanes.append(lane)
                except PeerUnavailableError as error:
                    found.never_started.append(lane)
                    found.unavailable[str(lane)] = str(error)
        yield found


def same_for_all(job: Job) -> Callable[[Lane], Job]:
    """Everyone has this job."""
    return lambda _: job


@dataclass(frozen=True, slots=True)
class Race:
    """What came of a race."""

    answers: dict[Lane, list[Answer]] = field(default_factory=dict)
    # Who failed, and why, in one line; what it had answered before does not count.
    lost: dict[Lane, str] = field(default_factory=dict)


def race(
    lanes: Iterable[Lane], job_for: Callable[[Lane], Job], effort: Effort, sleep: Callable[[float], None] = time.sleep
) -> Race:
    """Everyone's answers to their jobs: a first turn that does not count, then rounds in which all have one turn each.

    The process of a lane that fails is ended; the next race that it is in starts it again.

    Args:
        lanes: who takes part.
        job_for: a lane's job.
        effort: how many rounds.
        sleep: waits for spinning threads.
    """
    jobs = {lane: job_for(lane) for lane in lanes}
    found = Race()

    def turn(lane: Lane) -> Answer | None:
        try:
            if not lane.process.is_running:
                lane.process.start()
            answer = lane.process.translate(jobs[lane])
        except PeerUnavailableError as error:
            # Whatever state it is in, and whatever it may still say, is of no use to the next job.
            lane.process.close()
            found.lost[lane] = str(error)
            found.answers.pop(lane, None)
            del jobs[lane]
            return None
        if lane.settles and len(jobs) > 1:
            sleep(_SETTLE_S)
        return answer

    warm = [answer for lane in list(jobs) if (answer := turn(lane)) is not None]
    if not warm:
        return found
    for _ in range(rounds_for(min(answer.seconds for answer in warm), effort)):
        for lane in list(jobs):
            if (answer := turn(lane)) is not None:
                found.answers.setdefault(lane, []).append(answer)
    return found
