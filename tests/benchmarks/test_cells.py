from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import offline, report
from benchmarks.cells import Cell, best_splits, ratio, speed, tables
from benchmarks.markdown import figure, number, table
from benchmarks.peers.base import Split
from benchmarks.results import Measurement, Section
from tests.benchmarks.test_results import report as report_of


def cell(peer: str, sentences_per_s: float, **overrides: Any) -> Cell:
    fields: dict[str, Any] = {
        "model": "base-random",
        "peer": peer,
        "precision": "int8",
        "split": Split(2, 1),
        "settings": "as it comes",
        "batch": 32,
        "beam_size": 1,
        "one_at_a_time": False,
        "sources": 64,
        "tokens_per_s": Measurement((32 * sentences_per_s,), "tokens/s"),
        "sentences_per_s": Measurement((sentences_per_s,), "sentences/s"),
        "cpu_s_per_sentence": Measurement((0.02,)),
    }
    return Cell(**{**fields, **overrides})


def latency_cell(peer: str, *latencies_s: float, **overrides: Any) -> Cell:
    return cell(peer, 1.0, batch=1, one_at_a_time=True, latency_s=Measurement(latencies_s), **overrides)


CELLS = [
    cell("onnxlate", 150.0),
    cell("onnxlate", 90.0, split=Split(1, 1)),
    cell("ctranslate2", 60.0),
    cell("ctranslate2", 100.0, split=Split(1, 2)),
    cell("ctranslate2", 40.0, beam_size=4),
]


def test_the_best_split_is_the_fastest_of_each_setting_and_library() -> None:
    best = [(c.peer, c.beam_size, str(c.split)) for c in best_splits(CELLS)]
    assert best == [("onnxlate", 1, "2 x 1"), ("ctranslate2", 1, "1 x 2"), ("ctranslate2", 4, "2 x 1")]


def test_one_at_a_time_is_judged_by_the_median_latency() -> None:
    slow, fast = latency_cell("ctranslate2", 0.2, 0.2, 9.0), latency_cell("ctranslate2", 0.1, split=Split(1, 2))
    assert speed(slow) == pytest.approx(5.0)
    assert best_splits([slow, fast]) == [fast]


def test_ratios_are_of_speed() -> None:
    assert ratio(cell("onnxlate", 150.0), cell("ctranslate2", 100.0)) == pytest.approx(1.5)
    assert ratio(latency_cell("onnxlate", 0.1), latency_cell("ctranslate2", 0.25)) == pytest.approx(2.5)


def test_the_table_compares_with_the_best_split_of_the_same_setting() -> None:
    lines = tables(CELLS).splitlines()
    ours = next(line for line in lines if line.startswith("| 32 | 1 | onnxlate | 2 x 1"))
    assert "| 1.50 |" in ours
    assert "### base-random, int8" in lines
    assert sum("as it comes" in line for line in lines) == len(CELLS)


def test_the_table_has_no_ratio_where_ctranslate2_did_not_run() -> None:
    (line,) = [line for line in tables([CELLS[0]]).splitlines() if line.startswith("| 32 | 1 | onnxlate")]
    assert line.endswith("|  |  |")


def test_the_table_has_no_ratio_where_a_lane_of_ctranslate2_was_lost() -> None:
    whole = [cell("onnxlate", 15.0, batch=8), cell("ctranslate2", 10.0, batch=8)]
    damaged = [cell("onnxlate", 150.0, lost=("1 x 2",)), cell("ctranslate2", 100.0, lost=("1 x 2, MKL",))]
    rows = [line for line in tables([*whole, *damaged]).splitlines() if "onnxlate" in line and "as it comes" not in line]
    assert "| 1.50 |" in rows[0]
    assert "| none: CTranslate2 lost 1 x 2, MKL |" in rows[1]


def test_the_best_may_be_one_backend_or_the_other() -> None:
    slow, fast = cell("ctranslate2", 10.0, kernels="oneDNN"), cell("ctranslate2", 20.0, kernels="MKL")
    assert best_splits([slow, fast]) == [fast]
    assert "| CTranslate2 | 2 x 1, MKL | 64 |" in tables([slow, fast])


def test_bleu_stands_with_the_number_of_sources() -> None:
    (line,) = [line for line in tables([cell("onnxlate", 10.0, bleu=35.7)]).splitlines() if line.endswith("| 35.70 |")]
    assert "| 2 x 1 | 64 |" in line


def test_a_page_shows_sections_notes_and_reasons() -> None:
    section = Section.of(CELLS, notes=["MKL was slower"], unavailable={"hugging_face": "not installed"}, seconds=12.0)
    page = report.render(replace(report_of(offline=section), command="python -m benchmarks --quick"), {"offline": offline})
    for part in (
        "# onnxlate benchmark",
        "| command | `python -m benchmarks --quick` |",
        offline.METHOD,
        "A CPU, 2 cores used, avx2",
        "## Offline grid",
        "- MKL was slower",
        "Took 12 s.",
    ):
        assert part in page
    assert "Could not run:\n\n- hugging_face: not installed" in page
    assert "small" in page


def test_a_page_says_that_nothing_was_measured() -> None:
    section = Section(notes=("The experiment failed: ImportError: no module",))
    page = report.render(report_of(served=section), {})
    assert "## served\n\nNothing was measured.\n\n- The experiment failed: ImportError: no module" in page


def test_a_report_is_written_with_its_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page = report.write_all(report_of(offline=Section.of(CELLS)), {"offline": offline}, tmp_path / "out")
    assert "](offline-base-random-int8.png)" in page.read_text()
    assert (tmp_path / "out" / "offline-base-random-int8.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("value", "expected"), [(0.01234, "0.0123"), (3.14159, "3.14"), (99.96, "100"), (1234.5, "1234"), (0.0, "0")]
)
def test_numbers_have_three_digits_or_all_before_the_point(value: float, expected: str) -> None:
    assert number(value) == expected


def test_a_figure_has_its_spread() -> None:
    assert figure(Measurement((3.0, 1.0, 2.0))) == "2 (1 to 3)"


def test_a_table_escapes_what_would_break_it() -> None:
    assert table(("a", "b"), [("x|y", "two\nlines")]) == "| a | b |\n|---|---|\n| x\\|y | two lines |"
    assert table(("a",), []) == ""
