from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import served
from benchmarks.experiment import Setting
from benchmarks.models import BASE_RANDOM, BUNDLED, TRAINED, BenchModel
from benchmarks.process import PeerUnavailableError
from benchmarks.served import comparison, page
from benchmarks.served.comparison import Peer, chosen_model, contenders, effort_of, open_peer, read_corpus
from benchmarks.served.point import Corpus
from benchmarks.served.servers import Knobs, MosecServer, OnnxlateServer, ServerUnavailableError
from benchmarks.served.sweep import FULL, QUICK, Sweep
from tests.benchmarks.served.support import NOWHERE, point


def test_the_package_is_an_experiment() -> None:
    assert served.TITLE == "Served"
    assert (served.run, served.render, served.plot) == (comparison.run, page.render, page.plot)
    assert "alternates" in served.METHOD


def test_it_is_of_the_cpu(tmp_path: Path) -> None:
    section = served.run(Setting(device="cuda", build=tmp_path))
    assert (section.records, section.notes) == ((), ("Served is measured on the CPU alone.",))


def test_the_trained_base_model_is_taken_where_it_is_there(tmp_path: Path) -> None:
    there = Setting(build=tmp_path, trained=tmp_path)
    assert chosen_model(there).name == TRAINED
    assert chosen_model(Setting(build=tmp_path, trained=tmp_path / "none")).name == BUNDLED
    assert chosen_model(Setting(build=tmp_path, trained=tmp_path, models=(BASE_RANDOM, BUNDLED))).name == BUNDLED


def test_no_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "all_models", lambda build, trained: {})
    with pytest.raises(PeerUnavailableError, match="no trained model is there"):
        chosen_model(Setting(build=tmp_path))


def test_captions_with_their_references_where_they_can_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    for language, text in (("en", "a dog\na cat\n"), ("de", "ein hund\neine katze\n")):
        (tmp_path / f"test_2016_flickr.{language}.gz").write_bytes(gzip.compress(text.encode()))
    corpus = read_corpus(tmp_path)
    assert (corpus.texts, corpus.references) == (("a dog", "a cat"), ("ein hund", "eine katze"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert read_corpus(tmp_path) == Corpus(texts=("a dog", "a cat"))


def test_without_captions_the_projects_own_sentences_are_sent(tmp_path: Path) -> None:
    corpus = read_corpus(tmp_path)
    assert len(corpus.texts) > 5
    assert all(text.strip() for text in corpus.texts)
    assert corpus.references == ()


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PeerUnavailableError, match="mosec is not installed"):
        open_peer(chosen_model(Setting(build=tmp_path)), Setting(build=tmp_path))


def test_a_model_whose_tokenizer_the_peers_program_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = SimpleNamespace(manifest=SimpleNamespace(tokenizer=SimpleNamespace(kind="tokens")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(BenchModel, "open_bundle", lambda self, precision: bundle)
    with pytest.raises(PeerUnavailableError, match="takes SentencePiece models, and bundled has tokens"):
        open_peer(chosen_model(Setting(build=tmp_path, trained=tmp_path / "none")), Setting(build=tmp_path))


def test_contenders_and_the_settings_that_are_tried(tmp_path: Path) -> None:
    (ours, make_ours), (theirs, make_theirs) = contenders(tmp_path, Peer(NOWHERE, {}), 2, 4)
    assert [knobs.batch for knobs in ours] == [128, 256, 64]
    assert [(knobs.batch, knobs.wait_ms) for knobs in theirs] == [(32, 2), (32, 5), (16, 2), (16, 5)]
    assert isinstance(make_ours(ours[0]), OnnxlateServer)
    assert isinstance(make_theirs(Knobs(batch=16, wait_ms=2)), MosecServer)
    assert len(contenders(tmp_path, None, 2, 1)) == 1


def test_times_are_the_modes_or_those_asked_for() -> None:
    assert effort_of(Setting()) == QUICK
    asked = effort_of(Setting(mode="full", closed_s=5.0, open_s=6.0))
    assert (asked.closed, asked.open) == (replace(FULL.closed, duration_s=5.0), replace(FULL.open, duration_s=6.0))
    assert replace(asked, closed=FULL.closed, open=FULL.open) == FULL


@pytest.mark.parametrize(
    "error", [RuntimeError("the load generator failed"), ServerUnavailableError("onnxlate ended with status 1: no memory")]
)
def test_points_stay_when_what_comes_after_them_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    measured: list[int] = []

    def run(self: Sweep, beam_size: int, contenders: object) -> None:
        measured.append(beam_size)
        self.points.append(point(beam_size=beam_size))

    def fail(*arguments: object) -> list[str]:
        raise error

    monkeypatch.setattr(Sweep, "run", run)
    monkeypatch.setattr(BenchModel, "bundle", lambda self, precision: tmp_path)
    monkeypatch.setattr(comparison, "on_our_own", fail)
    section = served.run(Setting(build=tmp_path, captions=tmp_path, peers=("onnxlate",), beam_sizes=(2,)))
    assert (measured, len(section.records)) == ([2], 1)
    assert section.unavailable == {"onnxlate's shell and soak": f"{type(error).__name__}: {error}"}
    assert "No BLEU: the captions' references, or sacrebleu, are not there." in section.notes
