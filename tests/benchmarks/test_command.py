from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks.experiment import Setting
from benchmarks.machine import CpuTimes
from benchmarks.report import JSON_NAME, PAGE_NAME
from benchmarks.results import Section, read_report


class Fake:
    """An experiment that writes down its setting."""

    TITLE, METHOD = "Fake", "It is made up."

    def __init__(self, section: Section | Exception) -> None:
        self.settings: list[Setting] = []
        self._section = section

    def run(self, setting: Setting) -> Section:
        self.settings.append(setting)
        if isinstance(self._section, Exception):
            raise self._section
        return self._section

    def render(self, section: Section) -> str:
        return "a table"

    def plot(self, section: Section, directory: Path) -> list[Any]:
        return []


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, experiment: Fake, *arguments: str) -> Any:
    monkeypatch.setattr(command, "load_experiment", lambda name: experiment)
    return CliRunner().invoke(command.main, ["--output", str(tmp_path), "--only", "served", *arguments])


MEASURED = Section(records=({"figure": 1},))


def test_what_is_asked_for_reaches_the_experiment_the_report_and_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    experiment = Fake(MEASURED)
    asked = ["--full", "--batch", "1", "--batch", "8", "--beam", "4", "--seconds", "5", "--sweep-seconds", "2.5", "--cores", "1"]
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
    result = run(monkeypatch, tmp_path, experiment, *asked, "--peers", "onnxlate", "--precision", "int8")
    assert result.exit_code == 0, result.output
    (setting,) = experiment.settings
    assert (setting.batches, setting.beam_sizes, setting.closed_s, setting.open_s) == ((1, 8), (4,), 5.0, 2.5)
    expected = (
        "python -m benchmarks --full --only served --peers onnxlate --precision int8 --batch 1 --batch 8 --beam 4 --seconds 5 "
        "--sweep-seconds 2.5 --cores 1 --device cpu"
    )
    assert read_report(tmp_path / JSON_NAME).command == expected
    page = (tmp_path / PAGE_NAME).read_text()
    assert f"`{expected}`" in page
    assert "## Fake\n\nIt is made up.\n\na table" in page


def test_the_command_that_a_report_records_is_understood_and_asks_for_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = Fake(MEASURED), Fake(MEASURED)
    run(monkeypatch, tmp_path, first, "--models", "bundled", "--beam", "4", "--seconds", "3")
    recorded = read_report(tmp_path / JSON_NAME).command.split()[3:]
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
    assert run(monkeypatch, tmp_path, second, *recorded).exit_code == 0
    assert first.settings == second.settings


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([CpuTimes(100, 7), CpuTimes(160, 27)], "its host kept 25% of the CPU time from the machine."),
        ([None, CpuTimes(160, 27)], "Took 0 s."),
    ],
)
def test_a_page_tells_what_the_host_took_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: list[CpuTimes | None], told: str
) -> None:
    read = iter(times)
    monkeypatch.setattr(command, "read_cpu_times", lambda: next(read))
    assert run(monkeypatch, tmp_path, Fake(MEASURED)).exit_code == 0
    assert told in (tmp_path / PAGE_NAME).read_text()


@pytest.mark.parametrize("section", [RuntimeError("no such thing"), Section(notes=("nothing here",))], ids=["raised", "empty"])
def test_a_run_that_measures_nothing_fails_and_leaves_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, section: Section | Exception
) -> None:
    result = run(monkeypatch, tmp_path, Fake(section))
    assert result.exit_code == 1
    assert "nothing was measured" in result.output
    assert "Nothing was measured." in (tmp_path / PAGE_NAME).read_text()


def test_one_experiment_that_measures_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"served": Fake(RuntimeError("no such thing")), "bound": Fake(MEASURED)}
    monkeypatch.setattr(command, "load_experiment", found.__getitem__)
    result = CliRunner().invoke(command.main, ["--output", str(tmp_path), "--only", "served,bound"])
    assert result.exit_code == 0, result.output
    assert "The experiment failed: RuntimeError: no such thing" in (tmp_path / PAGE_NAME).read_text()


def test_cores_are_the_first_that_it_may_use_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, list[int]]] = []
    system = SimpleNamespace(
        sched_getaffinity=lambda pid: {5, 2, 7}, sched_setaffinity=lambda pid, cpus: kept.append((pid, cpus))
    )
    monkeypatch.setattr(command, "os", system)
    command.pin(2)
    assert kept == [(0, [2, 5])]


def test_more_cores_than_it_may_use_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experiment = Fake(MEASURED)
    result = run(monkeypatch, tmp_path, experiment, "--cores", "4096")
    assert result.exit_code == 2
    assert "not 4096" in result.output
    assert experiment.settings == []
