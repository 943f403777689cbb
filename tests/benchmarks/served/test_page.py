from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import Section
from benchmarks.served.page import best_goodput, comparison, plot, render
from benchmarks.served.point import LoadPoint
from tests.benchmarks.served.support import point

PEER = "CTranslate2 + mosec"


def both(ours: dict[str, object], theirs: dict[str, object], **common: object) -> list[LoadPoint]:
    return [
        point(**common, **ours),
        point(server=PEER, settings="batches up to 16, wait 2 ms", **{"first_token_s": None, **common, **theirs}),
    ]


POINTS = [
    *both({"p50_s": 0.02}, {"p50_s": 0.05}, clients=1),
    *both({"throughput_per_s": 260.0, "bleu": 35.71, "texts": 900}, {"throughput_per_s": 180.0}, clients=64),
    point(clients=1, streamed=True, p50_s=9.0),
    *both({"goodput_per_s": 100.0}, {"goodput_per_s": 98.0, "p95_s": 0.19}, rate_per_s=100.0),
    *both({"goodput_per_s": 199.0}, {"goodput_per_s": 20.0, "p95_s": 2.5, "errors": {"HTTP 429": 7}}, rate_per_s=200.0),
]


def test_the_comparison_has_ratios_and_what_is_to_be_reached() -> None:
    assert comparison(POINTS).splitlines() == [
        "|  | onnxlate | CTranslate2 + mosec | ratio | to reach |",
        "|---|---|---|---|---|",
        "| goodput at p95 <= 200 ms, /s | 199 | 98 | 2.03 | >= 2 |",
        "| 64 clients, sentences/s | 260 | 180 | 1.44 | >= 1.3 |",
        "| one client, p50, ms | 20 | 50 | 0.4 | <= 0.6 |",
        "| memory after 64 clients, MiB | 300 | 300 | 1 |  |",
        "| CPU a sentence, 64 clients, ms | 8 | 8 | 1 |  |",
    ]


def test_a_comparison_without_the_peer() -> None:
    lines = comparison([one for one in POINTS if one.server != PEER]).splitlines()
    assert lines[2] == "| goodput at p95 <= 200 ms, /s | 199 | - | - | >= 2 |"


def test_no_rate_was_served_well() -> None:
    assert best_goodput([point(rate_per_s=10.0, p95_s=0.5)]) is None
    assert best_goodput([point(clients=1)]) is None
    assert best_goodput([]) is None


def test_the_page_has_every_point_by_model_and_beam() -> None:
    page = render(Section.of([*POINTS, point(beam_size=4, clients=8, errors={"INTERNAL": 2})]))
    assert [line for line in page.splitlines() if line.startswith("###")] == ["### small, greedy", "### small, beam 4"]
    loads = [line.split(" | ")[0] for line in page.splitlines() if "rows a worker" in line or "wait 2 ms" in line]
    assert loads == ["| 1", "| 1", "| 64", "| 64", "| 1, streamed", "| 100/s", "| 100/s", "| 200/s", "| 200/s", "| 8"]
    assert "| 35.7 (900) |" in page
    assert "| HTTP 429 7 |" in page
    assert "| INTERNAL 2 |" in page


def test_pictures_for_each_model_and_beam(tmp_path: Path) -> None:
    beam = both({}, {"p95_s": None}, rate_per_s=10.0, beam_size=4)
    plots = plot(Section.of([*POINTS, *beam]), tmp_path)
    assert [made.file_name for made in plots] == [
        f"served-small-beam{beam_size}-{name}.png" for beam_size in (1, 4) for name in ("p95", "goodput")
    ]
    for made in plots:
        assert (tmp_path / made.file_name).read_bytes().startswith(b"\x89PNG")


def test_no_picture_of_closed_loops(tmp_path: Path) -> None:
    assert plot(Section.of([point(clients=1)]), tmp_path) == []


def test_a_rate_is_of_an_open_loop() -> None:
    assert point(rate_per_s=5.0, errors={"a": 10}).as_rate.error_share == pytest.approx(0.01)
    assert point(requests=0, clients=1).error_share == 0
    with pytest.raises(AssertionError, match="a closed loop has no rate"):
        assert point(clients=1).as_rate
