from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import offline, peers, sentences
from benchmarks.experiment import Setting
from benchmarks.models import BUNDLED, BenchModel
from benchmarks.offline import Shape, Text
from benchmarks.peers.base import Job, Split
from benchmarks.process import Loaded
from tests.benchmarks.support import FakeProcess, answer, lane

MODEL = BenchModel(name="random", description="", build=Path("build"))
TRAINED = replace(MODEL, name="trained", is_trained=True)
NATURAL = Text(tuple((8, 9, 0) for _ in range(1000)))
FORCED = replace(NATURAL, target_tokens=32)


@pytest.mark.parametrize(
    ("model", "precision", "options", "expected"),
    [
        pytest.param(MODEL, "int8", {}, [(1, 1), (1, 4), (32, 1), (32, 4)], id="quick"),
        pytest.param(MODEL, "fp32", {}, [(32, 1)], id="quick, fp32"),
        pytest.param(TRAINED, "fp32", {}, [], id="quick, a trained model in fp32"),
        pytest.param(MODEL, "fp32", {"mode": "full"}, [*itertools.product((1, 8, 32, 128), (1, 4))], id="full"),
        pytest.param(TRAINED, "fp32", {"batches": (8,), "beam_sizes": (2, 4)}, [(8, 2), (8, 4)], id="what is asked for"),
        pytest.param(MODEL, "int8", {"mode": "full", "batches": (2,)}, [(2, 1), (2, 4)], id="batches alone"),
    ],
)
def test_cells_are_the_modes_or_those_asked_for(
    model: BenchModel, precision: Any, options: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    found = offline.shapes(model, precision, Setting(**options))
    assert [(shape.batch, shape.beam_size) for shape in found] == expected


@pytest.mark.parametrize(
    ("peer", "options", "expected"),
    [
        (peers.ONNXLATE, {"mode": "quick"}, ["2 x 1, 2 alone"]),
        (peers.ONNXLATE, {"mode": "full"}, ["2 x 1", "1 x 2", "2 x 1, 2 alone"]),
        (peers.CTRANSLATE2, {"mode": "quick"}, ["2 x 1", "1 x 2"]),
        (peers.ONNXLATE, {"mode": "quick", "device": "cuda"}, ["1 x 1"]),
    ],
)
def test_quick_mode_leaves_out_splits_of_our_own_alone(peer: str, options: dict[str, Any], expected: list[str]) -> None:
    assert [str(split) for split in offline.splits_to_try(peer, Setting(cores=2, **options))] == expected


@pytest.mark.parametrize(
    ("peer", "batch", "text", "full", "expected"),
    [
        pytest.param(peers.ONNXLATE, 1, NATURAL, True, 100, id="captions one at a time"),
        pytest.param(peers.HUGGING_FACE, 1, NATURAL, True, 100, id="the same ones for everyone"),
        pytest.param(peers.CTRANSLATE2, 1, NATURAL, False, 30, id="fewer of them in quick mode"),
        pytest.param(peers.CTRANSLATE2, 32, NATURAL, True, 1000, id="all captions"),
        pytest.param(peers.HUGGING_FACE, 32, NATURAL, True, 1000, id="all captions for everyone"),
        pytest.param(peers.ONNXLATE, 1, FORCED, True, 16, id="one length, one at a time"),
        pytest.param(peers.ONNXLATE, 1, FORCED, False, 6, id="fewer of them, too"),
        pytest.param(peers.ONNXLATE, 8, FORCED, True, 64, id="one length, four batches for each of two CPUs"),
        pytest.param(peers.ONNXLATE, 8, FORCED, False, 16, id="one batch for each"),
        pytest.param(peers.HUGGING_FACE, 8, FORCED, True, 8, id="one length, one batch at a time"),
    ],
)
def test_how_many_sources_a_peer_is_given(peer: str, batch: int, text: Text, full: bool, expected: int) -> None:
    count = offline.sources_for(peer, Shape(batch, 1), text, 2, full=full)
    assert count == expected
    assert len(text.job(Shape(batch, 1), count).sources) == expected


class Runner(FakeProcess):
    """A process that was loaded."""

    loaded = Loaded("as it comes", 1.0, 1.0, 1)

    def translate(self, job: Job) -> Any:
        return replace(super().translate(job), latencies_s=(0.1,) if job.one_at_a_time else ())


def test_a_lost_lane_is_told_in_the_cells_of_its_library() -> None:
    done = [answer(1.0)] * 9
    ours = lane(Runner(peers.ONNXLATE, [*done], []))
    stays = lane(Runner(peers.CTRANSLATE2, [*done], [], split=Split(2, 1), kernels="oneDNN"))
    fails = lane(Runner(peers.CTRANSLATE2, ["ran out of memory"], [], split=Split(1, 2), kernels="oneDNN"))
    not_built = lane(Runner(peers.CTRANSLATE2, [], [], split=Split(2, 1), kernels="MKL"))
    never_there = lane(Runner(peers.CTRANSLATE2, [], [], split=Split(4, 1), kernels="MKL"))
    cells, lost = offline.measure(
        MODEL, "int8", Shape(8, 1), FORCED, [ours, stays, fails], [not_built, never_there], Setting(cores=2)
    )
    assert lost == {fails: "ran out of memory"}
    assert [(cell.peer, cell.kernels, cell.lost) for cell in cells] == [
        (peers.ONNXLATE, "", ()),
        (peers.CTRANSLATE2, "oneDNN", ("1 x 2, oneDNN", "4 x 1, MKL")),
    ]


def test_a_missing_scorer_is_missed_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = SimpleNamespace(manifest=SimpleNamespace(ids=SimpleNamespace(eos=0)))
    monkeypatch.setattr(BenchModel, "open_bundle", lambda self, precision: bundle)
    monkeypatch.setattr(offline, "load_tokenizer", lambda bundle: None)
    monkeypatch.setattr(sentences, "read_captions", lambda data: sentences.Captions(("a dog",), ("ein Hund",)))
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    section = offline.run(Setting(build=tmp_path, models=(BUNDLED,), mode="full"))
    assert section.records == ()
    assert section.notes == ("bundled: import of sacrebleu halted; None in sys.modules",)
