from __future__ import annotations

import gzip
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import peers, race, sentences
from benchmarks.machine import CpuTimes, describe_machine, describe_packages, read_cpu_times
from benchmarks.models import BenchModel
from benchmarks.peers import onnxlate
from benchmarks.peers.base import Job, PeerSpec, Split
from benchmarks.process import PeerProcess, PeerUnavailableError
from export.pipeline import export_bundle
from serving.config import EngineConfig
from serving.request import Sequence
from tests.support import EOS_ID, write_tiny_checkpoint


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PeerSpec:
    work = tmp_path_factory.mktemp("bench")
    bundle = work / "bundle"
    export_bundle(write_tiny_checkpoint(work / "checkpoint"), bundle, show_progress=False)
    return PeerSpec(peer=peers.ONNXLATE, directory=bundle, precision="fp32", split=Split(2, 1))


JOB = Job(
    sources=((10, 11, 12, EOS_ID), (20, 21, EOS_ID), (30, 31, 32, 33, 34, EOS_ID)),
    batch=2,
    min_target_tokens=6,
    max_target_tokens=6,
)


def test_a_peer_in_its_own_process_answers_alike_together_and_one_at_a_time(spec: PeerSpec) -> None:
    with PeerProcess(spec) as process:
        together = process.translate(JOB)
        single = process.translate(replace(JOB, batch=1, one_at_a_time=True))
        wide = process.translate(replace(JOB, beam_size=4))
        assert process.loaded is not None
        assert process.loaded.description == "workers=2, the batch's rows each, fp32"
    assert together.targets == single.targets
    assert [len(target) for target in together.targets] == [6, 6, 6]
    assert together.target_tokens == wide.target_tokens == 18
    assert (len(together.latencies_s), len(single.latencies_s)) == (0, 3)


def test_a_job_that_fails_has_its_reason_and_the_next_one_is_done(spec: PeerSpec) -> None:
    with PeerProcess(spec) as process:
        with pytest.raises(PeerUnavailableError, match="EngineError: a graph failed"):
            process.translate(replace(JOB, sources=((9999, EOS_ID),)))
        assert len(process.translate(JOB).targets) == 3


def test_sources_that_are_never_answered_are_a_reason_and_are_dropped(spec: PeerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxlate, "_PATIENCE_S", 0.0)
    submitted: list[Sequence] = []
    cancelled: list[Sequence] = []
    peer = onnxlate.OnnxlatePeer(spec)
    try:
        peer.prepare(JOB)
        monkeypatch.setattr(peer._engine, "submit", submitted.extend)
        monkeypatch.setattr(peer._engine, "cancel", cancelled.extend)
        with pytest.raises(TimeoutError, match="0 of 3 sources, and none in 0 s"):
            peer.translate(JOB.sources, JOB)
    finally:
        peer.close()
    assert len(submitted) == 3
    assert cancelled == submitted


def test_a_model_that_is_not_there_is_a_reason(spec: PeerSpec, tmp_path: Path) -> None:
    with race.opened({"onnxlate": lambda: [replace(spec, directory=tmp_path / "none"), spec]}) as runners:
        assert [lane.process.spec for lane in runners.lanes] == [spec]
        assert [str(lane) for lane in runners.never_started] == ["onnxlate (2 x 1)"]
        assert "BundleError" in runners.unavailable["onnxlate (2 x 1)"]
        (lane,) = runners.lanes
    assert not lane.process.is_running


def test_a_library_that_is_not_installed_is_a_reason(spec: PeerSpec) -> None:
    process = PeerProcess(replace(spec, peer="none"))
    with pytest.raises(PeerUnavailableError, match=r"ModuleNotFoundError: No module named 'benchmarks\.peers\.none'"):
        process.start()
    assert not process.is_running


def test_a_process_that_ends_is_a_reason_and_it_can_be_started_again(spec: PeerSpec) -> None:
    with PeerProcess(spec) as process:
        (child,) = multiprocessing.active_children()
        child.kill()
        child.join()
        with pytest.raises(
            PeerUnavailableError, match=r"^its process (ended with exit status -9|has ended \(BrokenPipeError: .*)"
        ):
            process.translate(JOB)
        process.close()
        process.close()
        process.start()
        assert len(process.translate(JOB).targets) == 3
    process.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("split", "workers", "alone"),
    [
        pytest.param(Split(2, 1), 2, 1, id="a thread each"),
        pytest.param(Split(1, 2), 1, 2, id="all threads on one batch"),
        pytest.param(Split(2, 1, threads_when_alone=2), 2, 2, id="the default"),
    ],
)
def test_a_split_is_the_engines_threads(spec: PeerSpec, split: Split, workers: int, alone: int) -> None:
    config = onnxlate.engine_config(replace(spec, split=split))
    assert (config.num_workers, config.lone_threads) == (workers, alone)


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_the_default_split_is_the_engines(spec: PeerSpec, cores: int) -> None:
    config = onnxlate.engine_config(replace(spec, split=peers.default_split(cores)))
    default = EngineConfig(threads=cores)
    assert (config.num_workers, config.lone_threads) == (default.num_workers, default.lone_threads)


def test_several_workers_of_several_threads_are_refused(spec: PeerSpec) -> None:
    with pytest.raises(ValueError, match="one thread for each of several workers, not 2 x 2"):
        onnxlate.engine_config(replace(spec, split=Split(2, 2)))


def test_the_default_split_answers_as_the_others_do(spec: PeerSpec) -> None:
    with PeerProcess(spec) as plain, PeerProcess(replace(spec, split=peers.default_split(2))) as default:
        single = replace(JOB, batch=1, one_at_a_time=True)
        assert default.translate(single).targets == plain.translate(single).targets
        assert default.loaded is not None
        assert default.loaded.description == "workers=2, threads when alone=2, the batch's rows each, fp32"


def test_a_checkpoint_that_cannot_be_exported_is_a_reason_and_leaves_nothing(tmp_path: Path) -> None:
    model = BenchModel(name="broken", description="", build=tmp_path / "build", checkpoint=tmp_path)
    with pytest.raises(PeerUnavailableError, match="CheckpointError"):
        model.bundle("fp32")
    assert list((tmp_path / "build" / "broken").iterdir()) == []


def test_hugging_face_has_no_int8(tmp_path: Path) -> None:
    model = BenchModel(name="any", description="", build=tmp_path, checkpoint=tmp_path)
    with pytest.raises(PeerUnavailableError, match="has no int8"):
        model.directory_for(peers.HUGGING_FACE, "int8")


# What is translated, and where.


def test_random_sources_are_the_same_again_and_end() -> None:
    made = sentences.random_sources(3, 5, range(10, 20), 0)
    assert made == sentences.random_sources(3, 5, range(10, 20), 0)
    assert len(set(made)) == 3
    assert all(len(source) == 5 and source[-1] == 0 and min(source[:-1]) >= 10 for source in made)


def write_captions(directory: Path, english: str, german: str) -> None:
    for language, text in (("en", english), ("de", german)):
        (directory / f"test_2016_flickr.{language}.gz").write_bytes(gzip.compress(text.encode()))


def test_captions_are_read_with_their_references(tmp_path: Path) -> None:
    write_captions(tmp_path, "a dog\na cat \n", "ein Hund\neine Katze\n")
    captions = sentences.read_captions(tmp_path)
    assert captions.first(1) == sentences.Captions(("a dog",), ("ein Hund",))
    assert captions.sources == ("a dog", "a cat")


def test_captions_without_all_references_are_refused(tmp_path: Path) -> None:
    write_captions(tmp_path, "a dog\na cat\n", "ein Hund\n")
    with pytest.raises(ValueError, match="2 sources, but 1 references"):
        sentences.read_captions(tmp_path)


def test_bleu_is_of_the_whole_corpus() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    bleu = sentences.bleu_scorer()
    assert bleu(["ein Hund läuft im Park"], ["ein Hund läuft im Park"]) == pytest.approx(100.0)
    assert bleu(["ein Hund läuft im Park"], ["eine Katze schläft im Haus"]) < 50


def test_a_machine_is_described_by_what_decides_speed(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni rdtscp\n")
    machine = describe_machine(2, cpuinfo=cpuinfo)
    assert (machine.cpu, machine.cores, machine.isa) == ("A CPU @ 2 GHz", 2, ("avx2", "avx512_vnni"))


def test_a_machine_that_says_nothing_is_called_by_its_kind(tmp_path: Path) -> None:
    machine = describe_machine(1, cpuinfo=tmp_path / "none")
    assert machine.cpu
    assert machine.isa == ()


def test_what_the_host_took_is_a_share_of_what_was_wanted(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 20 5000 60 1 2 30 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    before = read_cpu_times(stat)
    assert before == CpuTimes(worked=133, stolen=30)
    # Idle, and waiting for a disk: nobody wanted a CPU.
    stat.write_text("cpu  150 10 29 9000 99 1 3 50 0 0\n")
    after = read_cpu_times(stat)
    assert after is not None
    assert after.stolen_since(before) == pytest.approx(20 / 80)
    assert after.stolen_since(after) == 0.0


@pytest.mark.parametrize("text", ["", "cpu 1 2 3\n", "cpu  one 2 3 4 5 6 7 8 9\n"])
def test_a_system_that_does_not_tell_what_its_host_took(tmp_path: Path, text: str) -> None:
    assert read_cpu_times(tmp_path / "none") is None
    (tmp_path / "stat").write_text(text)
    assert read_cpu_times(tmp_path / "stat") is None


def test_packages_that_are_not_there_are_left_out() -> None:
    assert list(describe_packages(["numpy", "no-such-package"])) == ["numpy"]
