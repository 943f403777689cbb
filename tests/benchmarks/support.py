"""Lanes whose processes answer from a list."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from benchmarks.peers.base import Answer, Job, PeerSpec, Split
from benchmarks.process import PeerProcess, PeerUnavailableError
from benchmarks.race import Lane


def answer(seconds: float, *, tokens: int = 10) -> Answer:
    return Answer(
        targets=((5,), (6,)),
        target_tokens=tokens,
        seconds=seconds,
        cpu_seconds=seconds,
        latencies_s=(),
        rss_bytes=1,
        peak_rss_bytes=1,
    )


@dataclass(eq=False)
class FakeProcess:
    """Answers from a list; a text in it is the reason why it fails. Writes down whose turn it was, and its starts and ends."""

    name: str
    answers: list[Answer | str]
    turns: list[str]
    split: Split = Split(1, 1)  # noqa: RUF009  # frozen
    kernels: str = ""
    starts_again: bool = True
    is_running: bool = True
    spec: PeerSpec = field(init=False)

    def __post_init__(self) -> None:
        self.spec = PeerSpec(peer=self.name, directory=Path("model"), precision="int8", split=self.split, kernels=self.kernels)

    def start(self) -> None:
        self.turns.append(f"start {self.name}")
        if not self.starts_again:
            raise PeerUnavailableError("cannot be loaded")
        self.is_running = True

    def translate(self, job: Job) -> Answer:
        assert self.is_running
        self.turns.append(self.name)
        found = self.answers.pop(0)
        if isinstance(found, str):
            raise PeerUnavailableError(found)
        return found

    def close(self) -> None:
        self.turns.append(f"close {self.name}")
        self.is_running = False


def lane(process: FakeProcess) -> Lane:
    return Lane(cast(PeerProcess, process))
