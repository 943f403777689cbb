from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.growth import Axis, Place, Point
from benchmarks.peers.base import Job
from benchmarks.race import Effort
from benchmarks.results import Measurement, Section
from tests.benchmarks.support import FakeProcess, answer, lane

POINTS = [
    Point(axis="beam", x=1, peer="onnxlate", workers=2, value=Measurement((0.010, 0.012, 0.011))),
    Point(axis="beam", x=1, peer="ctranslate2", workers=2, value=Measurement((0.022,))),
    Point(axis="beam", x=4, peer="onnxlate", workers=2, value=Measurement((0.040,))),
    Point(axis="start", peer="onnxlate", workers=2, quantity=growth.LOAD, value=Measurement((0.5,))),
]


def test_every_axis_goes_as_far_as_it_should() -> None:
    ends: dict[str, list[int]] = {}
    for axis, x, _ in growth.places(full=True):
        ends.setdefault(axis, []).append(x)
    assert {axis: (xs[0], xs[-1]) for axis, xs in ends.items()} == {
        "target tokens": (16, 256),
        "source tokens": (8, 256),
        "beam": (1, 8),
        "batch": (1, 128),
    }


def test_one_thing_is_changed_at_a_time() -> None:
    for axis, x, place in growth.places(full=True):
        assert place == replace(Place(), **{axis.replace(" ", "_").replace("beam", "beam_size"): x})


def test_a_job_forces_the_length() -> None:
    job = growth.job_for(Place(target_tokens=16, source_tokens=5, batch=3), 2, ids=range(10, 20), eos_id=0)
    assert [len(source) for source in job.sources] == [5] * 6
    assert (job.min_target_tokens, job.max_target_tokens, job.batch) == (16, 16, 3)


def test_a_place_that_two_axes_share_is_measured_once_and_who_is_lost_there_is_told() -> None:
    turns: list[str] = []
    ours = lane(FakeProcess("onnxlate", [answer(4.0)] * 4, turns))
    theirs = lane(FakeProcess("ctranslate2", [answer(9.0), "ran out of memory", *[answer(8.0)] * 2], turns))
    steps: list[tuple[Axis, int, Place]] = [("beam", 1, Place()), ("batch", 8, Place()), ("batch", 4, Place(batch=4))]
    once = Effort(min_seconds=0.0, min_rounds=1, max_rounds=1)

    def job_at(place: Place, workers: int) -> Job:
        return growth.job_for(place, workers, ids=range(10, 20), eos_id=0)

    points, lost = growth.along_axes([ours, theirs], steps, 1, job_at, once, lambda line: None)
    assert [(p.axis, p.x, p.peer, p.value.median) for p in points] == [
        ("beam", 1, "onnxlate", 0.5),
        ("batch", 8, "onnxlate", 0.5),
        ("batch", 4, "onnxlate", 1.0),
        ("batch", 4, "ctranslate2", 2.0),
    ]
    assert lost == {"ctranslate2 (1 x 1), beam 1": "ran out of memory"}


def test_the_page_compares_where_both_ran() -> None:
    page = growth.render(Section.of(POINTS))
    assert "| 2 | 1 | 11 (10 to 12) | 22 (22 to 22) | 2.00 |" in page
    assert "| 2 | 4 | 40 (40 to 40) |  |  |" in page
    assert "| load, s | 0.5 (0.5 to 0.5) |" in page


def test_each_axis_has_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (made,) = growth.plot(Section.of(POINTS), tmp_path)
    assert (tmp_path / made.file_name).read_bytes().startswith(b"\x89PNG")
