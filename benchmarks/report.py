"""The page: everything a run found, as Markdown with its pictures beside it. What is in a section, its experiment renders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.experiment import Experiment
from benchmarks.markdown import table
from benchmarks.results import Report, Section, write_report

JSON_NAME, PAGE_NAME = "report.json", "report.md"


def write_all(report: Report, experiments: Mapping[str, Experiment], directory: Path) -> Path:
    """Write the report as JSON, its page and its pictures into a directory; returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    write_report(report, directory / JSON_NAME)
    page = directory / PAGE_NAME
    page.write_text(render(report, experiments, directory))
    return page


def render(report: Report, experiments: Mapping[str, Experiment], pictures: Path | None = None) -> str:
    """The page.

    Args:
        report: what to show.
        experiments: by name, those that can show their section.
        pictures: where to write them; None leaves them out.
    """
    parts = ["# onnxlate benchmark", _machine(report)]
    for name, section in report.sections.items():
        parts.append(_section(name, section, experiments.get(name), pictures))
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(report: Report) -> str:
    machine = report.machine
    lines = [
        ("started", f"{report.started_at}, {report.mode} mode"),
        *([("command", f"`{report.command}`")] if report.command else []),
        ("CPU", f"{machine.cpu}, {machine.cores} cores used, {', '.join(machine.isa) or 'no instruction set of note'}"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("system", machine.system),
        *([("GPU", machine.gpu)] if machine.gpu else []),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        *((f"model {name}", line) for name, line in report.models.items()),
    ]
    return table(("", ""), lines)


def _section(name: str, section: Section, experiment: Experiment | None, pictures: Path | None) -> str:
    shown = experiment if section.records else None
    parts = [f"## {experiment.TITLE if experiment else name}"]
    parts += [shown.METHOD, shown.render(section)] if shown else ["Nothing was measured."]
    if shown is not None and pictures is not None:
        parts += [f"![{plot.caption}]({plot.file_name})" for plot in shown.plot(section, pictures)]
    parts += ["\n".join(f"- {note}" for note in section.notes)]
    if section.unavailable:
        parts.append("Could not run:\n\n" + "\n".join(f"- {who}: {reason}" for who, reason in section.unavailable.items()))
    stolen = (
        "" if section.stolen_share is None else f"; its host kept {section.stolen_share:.0%} of the CPU time from the machine"
    )
    parts.append(f"Took {section.seconds:.0f} s{stolen}.")
    return "\n\n".join(part for part in parts if part)
