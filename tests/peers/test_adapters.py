"""The benchmark's adapters: the same job through each of them, in processes of their own, on tiny Marian models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.conversion import convert_without_padding_rules, pieces_of
from benchmarks.marian import write_marian
from benchmarks.peers.base import Answer, Job, PeerSpec, Split
from benchmarks.process import PeerProcess
from tests.peers.conftest import write_random_checkpoint
from tests.peers.subject import Subject
from tests.support import write_tiny_checkpoint

for package in ("ctranslate2", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed; make test-peers does it")

pytestmark = pytest.mark.slow


def started(checkpoint: Path, work: Path) -> Iterator[tuple[Subject, dict[str, PeerProcess]]]:
    """A model, and peer -> its process, each with the model in its own form."""
    subject = Subject(checkpoint, work)
    marian = write_marian(subject.checkpoint, work / "marian")
    pieces = pieces_of(subject.checkpoint)
    directories = {
        peers.ONNXLATE: subject.bundle("fp32").directory,
        peers.CTRANSLATE2: convert_without_padding_rules(marian, pieces, work / "ctranslate2", "fp32"),
        peers.HUGGING_FACE: marian,
    }
    assert set(directories) == set(peers.PEERS)
    processes = {
        peer: PeerProcess(PeerSpec(peer=peer, directory=directory, precision="fp32", split=Split(1, 1)))
        for peer, directory in directories.items()
    }
    try:
        for process in processes.values():
            process.start()
        yield subject, processes
    finally:
        for process in processes.values():
            process.close()


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Subject, dict[str, PeerProcess]]]:
    """A model whose answers end at any length."""
    work = tmp_path_factory.mktemp("ending")
    yield from started(write_random_checkpoint(work / "checkpoint"), work)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Subject, dict[str, PeerProcess]]]:
    """A model whose answers hardly ever end by themselves."""
    work = tmp_path_factory.mktemp("endless")
    yield from started(write_tiny_checkpoint(work / "checkpoint", seed=2), work)


@pytest.mark.parametrize(
    ("model", "beam_size", "min_target_tokens", "max_target_tokens"),
    [
        pytest.param("ending", 1, 0, 40, id="greedy, natural lengths"),
        pytest.param("ending", 1, 0, 5, id="greedy, cut"),
        pytest.param("ending", 1, 9, 9, id="greedy, forced"),
        # Where hypotheses end, beam searches stop by rules of their own; and before the least length CTranslate2 shares the end's
        # probability among the other tokens, which may change the order of hypotheses. See test_ctranslate2.
        pytest.param("endless", 4, 0, 40, id="beams, cut"),
    ],
)
@pytest.mark.parametrize("one_at_a_time", [False, True], ids=["batches", "one at a time"])
def test_the_same_job_has_the_same_answers_and_counts(
    request: pytest.FixtureRequest,
    model: str,
    beam_size: int,
    min_target_tokens: int,
    max_target_tokens: int,
    one_at_a_time: bool,
) -> None:
    subject, processes = request.getfixturevalue(model)
    job = Job(
        sources=mixed(subject),
        batch=7,
        beam_size=beam_size,
        min_target_tokens=min_target_tokens,
        max_target_tokens=max_target_tokens,
    )
    if one_at_a_time:
        job = replace(job, batch=1, one_at_a_time=True)
    answers: dict[str, Answer] = {peer: process.translate(job) for peer, process in processes.items()}
    targets = answers[peers.ONNXLATE].targets
    assert len(targets) == len(job.sources)
    assert len(set(targets)) > 1
    counts = sum(min(len(target) + 1, max_target_tokens) for target in targets)
    for peer, answer in answers.items():
        assert answer.targets == targets, peer
        assert answer.target_tokens == counts, peer
        assert len(answer.latencies_s) == (len(targets) if one_at_a_time else 0)


def test_a_forced_length_is_the_same_work_for_beams(ending: tuple[Subject, dict[str, PeerProcess]]) -> None:
    subject, processes = ending
    job = Job(sources=mixed(subject), batch=7, beam_size=4, min_target_tokens=9, max_target_tokens=9)
    answers = {peer: process.translate(job) for peer, process in processes.items()}
    for answer in answers.values():
        assert [len(target) for target in answer.targets] == [9] * len(job.sources)
        assert answer.target_tokens == 9 * len(job.sources)
    assert answers[peers.ONNXLATE].targets == answers[peers.HUGGING_FACE].targets


def mixed(subject: Subject) -> list[tuple[int, ...]]:
    """Sources of mixed lengths and in no order, so that each adapter has to sort them and to put the answers back."""
    by_length = subject.sources()
    return [*by_length[::-3], *by_length[1::4]]
