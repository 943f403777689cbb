from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from benchmarks import backend, peers, race
from benchmarks.peers import splits_of
from benchmarks.peers.base import Answer, Job, Peer, PeerSpec, Split, count_tokens, longest_first, perform, resident_bytes
from benchmarks.process import PeerProcess, PeerUnavailableError
from benchmarks.race import Effort, Field, Lane

JOB = Job(sources=((5, 3), (6, 7, 3)), batch=2)
TWICE = Effort(min_seconds=0.0, min_rounds=2, max_rounds=2)


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
    """Answers from a list; a text in it is the reason why it fails. Writes down whose turn it was."""

    name: str
    answers: list[Answer | str]
    turns: list[str]
    spec: PeerSpec = field(init=False)
    threads: int = 1

    def __post_init__(self) -> None:
        self.spec = PeerSpec(peer=self.name, directory=Path("model"), precision="int8", split=Split(1, self.threads))

    def translate(self, job: Job) -> Answer:
        self.turns.append(self.name)
        found = self.answers.pop(0)
        if isinstance(found, str):
            raise PeerUnavailableError(found)
        return found


def lane(process: FakeProcess) -> Lane:
    return Lane(process.name, process.spec.split, cast(PeerProcess, process))


def test_everyone_has_one_turn_a_round_and_the_first_does_not_count() -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", [answer(9.0), answer(1.0), answer(2.0)], turns))
    b = lane(FakeProcess("b", [answer(8.0), answer(3.0), answer(4.0)], turns))
    found = race.race(Field([a, b]), race.same_for_all(JOB), TWICE)
    assert turns == ["a", "b"] * 3
    assert {one.peer: [x.seconds for x in answers] for one, answers in found.items()} == {"a": [1.0, 2.0], "b": [3.0, 4.0]}


def test_who_fails_is_dropped_with_the_reason_and_the_others_go_on() -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", [answer(9.0), "ran out of memory"], turns))
    b = lane(FakeProcess("b", [answer(8.0), answer(3.0), answer(4.0)], turns))
    runners = Field([a, b])
    found = race.race(runners, race.same_for_all(JOB), TWICE)
    assert list(found) == [b]
    assert runners.unavailable == {"a (1 x 1)": "ran out of memory"}
    assert turns == ["a", "b", "a", "b", "b"]


def test_a_race_in_which_all_fail_finds_nothing() -> None:
    a = lane(FakeProcess("a", ["no such model"], []))
    runners = Field([a])
    assert race.race(runners, race.same_for_all(JOB), TWICE) == {}
    assert runners.lanes == []


def test_a_lane_without_a_job_has_no_turn() -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", [answer(1.0)] * 3, turns))
    b = lane(FakeProcess("b", [], turns))
    assert list(race.race(Field([a, b]), lambda one: JOB if one.peer == "a" else None, TWICE)) == [a]
    assert turns == ["a", "a", "a"]


def test_the_next_turn_waits_for_threads_that_spin() -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", [answer(1.0)] * 3, turns, threads=2))
    b = lane(FakeProcess("b", [answer(1.0)] * 3, turns))
    race.race(Field([a, b]), race.same_for_all(JOB), TWICE, sleep=lambda _: turns.append("wait"))
    assert turns == ["a", "wait", "b"] * 3


@pytest.mark.parametrize(("fastest_s", "expected"), [(10.0, 2), (0.5, 6), (0.01, 9), (0.0, 9)])
def test_rounds_are_as_many_as_the_fastest_needs(fastest_s: float, expected: int) -> None:
    assert race.rounds_for(fastest_s, Effort(min_seconds=3.0, min_rounds=2, max_rounds=9)) == expected


def test_a_peer_that_cannot_be_made_has_its_reason() -> None:
    def make() -> list[PeerSpec]:
        raise PeerUnavailableError("ctranslate2 is not installed")

    with race.opened({"ctranslate2": make}) as runners:
        assert (runners.lanes, runners.unavailable) == ([], {"ctranslate2": "ctranslate2 is not installed"})


@pytest.mark.parametrize(
    ("peer", "cores", "device", "expected"),
    [
        pytest.param(peers.ONNXLATE, 2, "cpu", ["2 x 1", "1 x 2"], id="several batches, or all threads on one"),
        pytest.param(peers.CTRANSLATE2, 2, "cpu", ["2 x 1", "1 x 2"], id="both ways"),
        pytest.param(peers.CTRANSLATE2, 4, "cpu", ["4 x 1", "1 x 4", "2 x 2"], id="and between"),
        pytest.param(peers.HUGGING_FACE, 4, "cpu", ["1 x 4"], id="one batch"),
        pytest.param(peers.CTRANSLATE2, 1, "cpu", ["1 x 1"], id="one CPU, one way"),
        pytest.param(peers.CTRANSLATE2, 8, "cuda", ["1 x 1"], id="a GPU"),
    ],
)
def test_splits_to_try(peer: str, cores: int, device: str, expected: list[str]) -> None:
    assert [str(split) for split in splits_of(peer, cores, device)] == expected


def test_the_faster_backend_is_chosen_and_both_are_told() -> None:
    chosen = backend.fastest({"0": [answer(1.0, tokens=100)], "1": [answer(1.0, tokens=40)]}, "int8")
    assert chosen.environment == {"CT2_USE_MKL": "0"}
    (note,) = chosen.notes
    assert "runs on oneDNN (CT2_USE_MKL=0)" in note
    assert "oneDNN 100 tokens/s, MKL 40 tokens/s" in note


def test_no_backend_is_chosen_where_none_ran() -> None:
    assert backend.fastest({}, "int8") == backend.Backend()


# What a peer's own process does.


@dataclass
class EchoPeer:
    """Translates every source into itself."""

    calls: list[int] = field(default_factory=list)

    def prepare(self, job: Job) -> None:
        self.calls.append(-1)

    def translate(self, sources: object, job: Job) -> list[tuple[int, ...]]:
        found = cast(tuple[tuple[int, ...], ...], sources)
        self.calls.append(len(found))
        return [source[:-1] for source in found]

    def describe(self) -> str:
        return "echo"

    def close(self) -> None:
        self.calls.append(-2)


def test_a_job_is_one_call_or_one_for_each_source() -> None:
    together, single = EchoPeer(), EchoPeer()
    answered = perform(cast(Peer, together), JOB)
    assert (together.calls, answered.targets, answered.latencies_s) == ([-1, 2], ((5,), (6, 7)), ())
    answered = perform(cast(Peer, single), Job(sources=JOB.sources, batch=1, one_at_a_time=True))
    assert (single.calls, answered.targets, len(answered.latencies_s)) == ([-1, 1, 1], ((5,), (6, 7)), 2)
    assert 0 < sum(answered.latencies_s) <= answered.seconds
    assert 0 < answered.rss_bytes <= answered.peak_rss_bytes


def test_tokens_count_the_end_unless_the_limit_came_first() -> None:
    assert count_tokens([(1, 2), (1, 2, 3), ()], 3) == 3 + 3 + 1


def test_the_longest_comes_first() -> None:
    assert longest_first([(1,), (1, 2, 3), (1, 2), (4, 5, 6)]) == [1, 3, 2, 0]


def test_resident_memory_is_read_from_the_system(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n")
    assert resident_bytes(status) == (2**20, 2**21)
