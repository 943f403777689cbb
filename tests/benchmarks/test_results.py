from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pydantic
import pytest

from benchmarks.results import Machine, Measurement, Report, Section, from_json, read_report, to_json, write_report

MACHINE = Machine(cpu="A CPU", cores=2, memory_bytes=2**34, isa=("avx2",), system="Linux x86_64, Python 3.11.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    name: str
    value: Measurement
    note: str | None = None


def report(**sections: Section) -> Report:
    return Report(
        started_at="2026-01-02T03:04:05+00:00",
        mode="quick",
        machine=MACHINE,
        versions={"numpy": "2.0.0"},
        models={"small": "a small model"},
        sections=sections,
    )


def test_a_measurement_says_its_middle_and_its_spread() -> None:
    measured = Measurement((4.0, 1.0, 3.0, 2.0, 10.0))
    assert (measured.median, measured.low, measured.high, measured.quartiles) == (3.0, 1.0, 10.0, (2.0, 4.0))


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        pytest.param((5.0,), 95, 5.0, id="one sample"),
        pytest.param((1.0, 2.0), 50, 1.5, id="between two"),
        pytest.param((3.0, 1.0, 2.0), 0, 1.0, id="least"),
        pytest.param((3.0, 1.0, 2.0), 100, 3.0, id="greatest"),
        pytest.param((0.0, 10.0, 20.0, 30.0, 40.0), 90, 36.0, id="by straight line"),
    ],
)
def test_percentiles(samples: tuple[float, ...], percent: float, expected: float) -> None:
    assert Measurement(samples).percentile(percent) == pytest.approx(expected)


def test_a_measurement_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Measurement(())


def test_a_record_comes_back_from_json() -> None:
    record = Speed(name="a", value=Measurement((1.0, 2.5), "tokens/s"))
    written = json.loads(json.dumps(to_json(record)))
    assert from_json(Speed, written) == record


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    records = [Speed(name="a", value=Measurement((1.0,))), Speed(name="b", value=Measurement((2.0, 3.0)), note="odd")]
    section = Section.of(records, notes=["tried two"], unavailable={"other": "not installed"}, seconds=1.5)
    made = report(speeds=section)
    write_report(made, tmp_path / "report.json")
    read = read_report(tmp_path / "report.json")
    assert read == made
    assert read.sections["speeds"].records_as(Speed) == records


def test_records_of_another_kind_are_refused() -> None:
    section = Section(records=({"name": "a"},))
    with pytest.raises(pydantic.ValidationError, match="value"):
        section.records_as(Speed)


def test_a_report_of_another_revision_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report(), path)
    path.write_text(path.read_text().replace('"format_revision": 1', '"format_revision": 99'))
    with pytest.raises(ValueError, match="format revision 99; this reads 1"):
        read_report(path)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"mode": "quick"}')
    with pytest.raises(pydantic.ValidationError, match="started_at"):
        read_report(path)
