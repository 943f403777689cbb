from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks import served
from benchmarks.experiment import Setting
from benchmarks.models import BASE_RANDOM, BUNDLED, TRAINED
from benchmarks.process import PeerUnavailableError
from benchmarks.served import comparison, page
from benchmarks.served.comparison import Peer, chosen_model, contenders, open_peer, read_corpus
from benchmarks.served.servers import Knobs, MosecServer, OnnxlateServer
from tests.benchmarks.served.support import NOWHERE


def test_the_package_is_an_experiment() -> None:
    assert served.TITLE == "Served"
    assert (served.run, served.render, served.plot) == (comparison.run, page.render, page.plot)


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


def test_captions_with_their_references(tmp_path: Path) -> None:
    for language, text in (("en", "a dog\na cat\n"), ("de", "ein hund\neine katze\n")):
        (tmp_path / f"test_2016_flickr.{language}.gz").write_bytes(gzip.compress(text.encode()))
    corpus = read_corpus(tmp_path)
    assert (corpus.texts, corpus.references) == (("a dog", "a cat"), ("ein hund", "eine katze"))


def test_without_captions_the_projects_own_sentences_are_sent(tmp_path: Path) -> None:
    corpus = read_corpus(tmp_path)
    assert len(corpus.texts) > 5
    assert all(text.strip() for text in corpus.texts)
    assert corpus.references == ()


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PeerUnavailableError, match="mosec is not installed"):
        open_peer(chosen_model(Setting(build=tmp_path)), Setting(build=tmp_path))


def test_contenders_and_the_settings_that_are_tried(tmp_path: Path) -> None:
    (ours, make_ours), (theirs, make_theirs) = contenders(tmp_path, Peer(NOWHERE, {}), 2, 4)
    assert [knobs.batch for knobs in ours] == [128, 256, 64]
    assert [(knobs.batch, knobs.wait_ms) for knobs in theirs] == [(32, 5), (32, 2), (16, 5), (16, 2)]
    assert isinstance(make_ours(ours[0]), OnnxlateServer)
    assert isinstance(make_theirs(Knobs(batch=16, wait_ms=2)), MosecServer)
    assert len(contenders(tmp_path, None, 2, 1)) == 1
