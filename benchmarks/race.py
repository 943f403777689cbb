"""Several peers on the same jobs, in turns: A B A B, until there is enough of each.

Knows turns and repetitions; does not know what the jobs are for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
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


QUICK = Effort(min_seconds=0.6, min_rounds=2, max_rounds=4)
FULL = Effort(min_seconds=2.0, min_rounds=3, max_rounds=9)


def rounds_for(fastest_s: float, effort: Effort) -> int:
    """How often everyone has a turn, when the fastest needs ``fastest_s`` for one."""
    return max(effort.min_rounds, min(effort.max_rounds, math.ceil(effort.min_seconds / max(fastest_s, 1e-6))))


@dataclass(frozen=True, slots=True)
class Lane:
    """One peer with one split."""

    peer: str
    split: Split
    process: PeerProcess

    @property
    def settles(self) -> bool:
        """Whether its threads may still spin when it has answered."""
        return self.process.spec.split.threads > 1


@dataclass(slots=True)
class Field:
    """The lanes of a race, and why a peer is not, or no longer, in it."""

    lanes: list[Lane] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def drop(self, lane: Lane, reason: str) -> None:
        """Leave a lane out from now on."""
        self.lanes.remove(lane)
        self.unavailable[f"{lane.peer} ({lane.split})"] = reason


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
                for spec in make():
                    process = stack.enter_context(PeerProcess(spec))
                    found.lanes.append(Lane(peer, spec.split, process))
            except PeerUnavailableError as error:
                found.unavailable[peer] = str(error)
        yield found


def same_for_all(job: Job) -> Callable[[Lane], Job]:
    """Everyone has this job."""
    return lambda _: job


def race(
    runners: Field, job_for: Callable[[Lane], Job | None], effort: Effort, sleep: Callable[[float], None] = time.sleep
) -> dict[Lane, list[Answer]]:
    """Everyone's answers to their jobs: a first turn that does not count, then rounds in which all have one turn each.

    Args:
        runners: whoever fails is dropped from it.
        job_for: a lane's job, or None where it has none.
        effort: how many rounds.
        sleep: waits for spinning threads.
    """
    jobs = {lane: job for lane in runners.lanes if (job := job_for(lane)) is not None}
    answers: dict[Lane, list[Answer]] = {}

    def turn(lane: Lane) -> Answer | None:
        try:
            answer = lane.process.translate(jobs[lane])
        except PeerUnavailableError as error:
            runners.drop(lane, str(error))
            del jobs[lane]
            answers.pop(lane, None)
            return None
        if lane.settles and len(jobs) > 1:
            sleep(_SETTLE_S)
        return answer

    warm = [answer for lane in list(jobs) if (answer := turn(lane)) is not None]
    if not warm:
        return {}
    for _ in range(rounds_for(min(answer.seconds for answer in warm), effort)):
        for lane in list(jobs):
            if (answer := turn(lane)) is not None:
                answers.setdefault(lane, []).append(answer)
    return answers
