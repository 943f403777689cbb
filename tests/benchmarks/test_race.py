from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from benchmarks import backend, peers, race
from benchmarks.peers import splits_of
from benchmarks.peers.base import Answer, Job, Peer, PeerSpec, Split, count_tokens, longest_first, perform, resident_bytes
from benchmarks.process import PeerUnavailableError
from benchmarks.race import Effort, Lane
from tests.benchmarks.support import FakeProcess, answer, lane

JOB = Job(sources=((5, 3), (6, 7, 3)), batch=2)
TWICE = Effort(min_seconds=0.0, min_rounds=2, max_rounds=2)


def test_everyone_has_one_turn_a_round_and_the_first_does_not_count() -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", [answer(9.0), answer(1.0), answer(2.0)], turns))
    b = lane(FakeProcess("b", [answer(8.0), answer(3.0), answer(4.0)], turns))
    found = race.race([a, b], race.same_for_all(JOB), TWICE)
    assert turns == ["a", "b"] * 3
    assert {one.peer: [x.seconds for x in answers] for one, answers in found.answers.items()} == {
        "a": [1.0, 2.0],
        "b": [3.0, 4.0],
    }
    assert found.lost == {}


def test_who_fails_is_lost_with_the_reason_its_process_is_ended_and_the_others_go_on() -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", [answer(9.0), answer(9.0), "ran out of memory"], turns))
    b = lane(FakeProcess("b", [answer(8.0), answer(3.0), answer(4.0)], turns))
    found = race.race([a, b], race.same_for_all(JOB), TWICE)
    assert list(found.answers) == [b]
    assert found.lost == {a: "ran out of memory"}
    assert turns == ["a", "b", "a", "b", "a", "close a", "b"]


def test_who_was_lost_is_started_again_for_the_next_race() -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", ["ran out of memory", *[answer(1.0)] * 3], turns))
    assert race.race([a], race.same_for_all(JOB), TWICE).answers == {}
    found = race.race([a], race.same_for_all(JOB), TWICE)
    assert ([len(some) for some in found.answers.values()], found.lost) == ([2], {})
    assert turns == ["a", "close a", "start a", "a", "a", "a"]


def test_who_cannot_be_started_again_is_lost_again() -> None:
    a = lane(FakeProcess("a", [], [], is_running=False, starts_again=False))
    assert race.race([a], race.same_for_all(JOB), TWICE).lost == {a: "cannot be loaded"}


def test_a_race_of_nobody_finds_nothing() -> None:
    assert race.race([], race.same_for_all(JOB), TWICE) == race.Race()


@pytest.mark.parametrize("split", [Split(1, 2), Split(2, 1, threads_when_alone=2)], ids=str)
def test_the_next_turn_waits_for_threads_that_spin(split: Split) -> None:
    turns: list[str] = []
    a = lane(FakeProcess("a", [answer(1.0)] * 3, turns, split=split))
    b = lane(FakeProcess("b", [answer(1.0)] * 3, turns))
    race.race([a, b], race.same_for_all(JOB), TWICE, sleep=lambda _: turns.append("wait"))
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
        pytest.param(peers.ONNXLATE, 2, "cpu", ["2 x 1", "1 x 2", "2 x 1, 2 alone"], id="both ways, and the default"),
        pytest.param(peers.ONNXLATE, 1, "cpu", ["1 x 1"], id="one CPU, one way, and the default is that"),
        pytest.param(peers.CTRANSLATE2, 2, "cpu", ["2 x 1", "1 x 2"], id="both ways"),
        pytest.param(peers.CTRANSLATE2, 4, "cpu", ["4 x 1", "1 x 4", "2 x 2"], id="and between"),
        pytest.param(peers.HUGGING_FACE, 4, "cpu", ["1 x 4"], id="one batch"),
        pytest.param(peers.CTRANSLATE2, 1, "cpu", ["1 x 1"], id="one CPU, one way"),
        pytest.param(peers.CTRANSLATE2, 8, "cuda", ["1 x 1"], id="a GPU"),
    ],
)
def test_splits_to_try(peer: str, cores: int, device: str, expected: list[str]) -> None:
    assert [str(split) for split in splits_of(peer, cores, device)] == expected


def test_kernels_are_a_choice_of_ctranslate2s_on_a_cpu() -> None:
    spec = PeerSpec(peer=peers.CTRANSLATE2, directory=Path("model"), precision="int8", split=Split(1, 2))
    found = [(one.kernels, one.environment, one.split) for one in backend.variants(spec)]
    assert found == [("oneDNN", {"CT2_USE_MKL": "0"}, spec.split), ("MKL", {"CT2_USE_MKL": "1"}, spec.split)]
    for other in (replace(spec, peer=peers.ONNXLATE), replace(spec, device="cuda")):
        assert backend.variants(other) == [other]


def kernel_lanes(turns: list[str], **answers: Answer | str) -> list[Lane]:
    """A lane for each split and backend, named as in ``oneDNN_1x2``."""
    made = []
    for name, one in answers.items():
        kernels, _, split = name.partition("_")
        workers, threads = map(int, split.split("x"))
        made.append(lane(FakeProcess(peers.CTRANSLATE2, [one] * 4, turns, split=Split(workers, threads), kernels=kernels)))
    return made


def test_each_split_runs_batches_with_the_backend_that_is_faster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_SETTLE_S", 0.0)
    fast, slow = answer(1.0, tokens=100), answer(1.0, tokens=40)
    theirs = kernel_lanes([], oneDNN_2x1=fast, MKL_2x1=slow, oneDNN_1x2=slow, MKL_1x2=fast)
    ours = lane(FakeProcess(peers.ONNXLATE, [], []))
    choice = backend.choose([ours, *theirs])
    assert [str(one) for one in choice.lanes] == ["onnxlate (1 x 1)", "ctranslate2 (2 x 1, oneDNN)", "ctranslate2 (1 x 2, MKL)"]
    assert choice.notes == (
        "CTranslate2 2 x 1 runs batches on oneDNN; tried at batch 8: oneDNN 100 tokens/s, MKL 40 tokens/s",
        "CTranslate2 1 x 2 runs batches on MKL; tried at batch 8: oneDNN 40 tokens/s, MKL 100 tokens/s",
    )


def test_without_batches_only_a_hopeless_backend_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_SETTLE_S", 0.0)
    theirs = kernel_lanes([], oneDNN_2x1=answer(1.0, tokens=100), MKL_2x1=answer(1.0, tokens=30), MKL_1x2=answer(1.0, tokens=9))
    theirs += kernel_lanes([], oneDNN_1x2=answer(1.0, tokens=100))
    contenders = [str(one) for one in backend.choose(theirs).contenders]
    assert contenders == ["ctranslate2 (2 x 1, oneDNN)", "ctranslate2 (2 x 1, MKL)", "ctranslate2 (1 x 2, oneDNN)"]


def test_a_backend_that_fails_is_not_chosen() -> None:
    choice = backend.choose(kernel_lanes([], oneDNN_2x1=answer(1.0, tokens=40), MKL_2x1="no such instruction"))
    assert [one.kernels for one in choice.lanes] == ["oneDNN"]
    assert choice.notes == (
        "CTranslate2 2 x 1 runs batches on oneDNN; tried at batch 8: oneDNN 40 tokens/s, MKL failed (no such instruction)",
    )


def test_where_no_backend_answers_none_is_left_out() -> None:
    lanes = kernel_lanes([], oneDNN_2x1="out of memory", MKL_2x1="out of memory")
    assert backend.choose(lanes) == backend.Choice(lanes, lanes)


def test_there_is_nothing_to_choose_without_ctranslate2() -> None:
    ours = lane(FakeProcess(peers.ONNXLATE, [], []))
    assert backend.choose([ours]) == backend.Choice([ours], [ours])


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
