"""What a run of the benchmark found, and its file: measurements, records, sections, the report.

A record is a frozen dataclass of one experiment's own (``Cell`` is the offline grid's), a section is an experiment's records, a
report holds the sections of one run. Knows JSON; does not know how anything was measured, nor how it is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

FORMAT_REVISION = 1

Mode = Literal["quick", "full"]
Precision = Literal["fp32", "int8", "fp16"]
# A record as JSON has it; its keys are the fields of the experiment's dataclass.
JsonRecord = dict[str, Any]

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantity, measured several times; at least once."""

    # In the order in which they were taken.
    samples: tuple[float, ...]
    # Of the samples, as a reader sees it.
    unit: str = "s"

    def __post_init__(self) -> None:
        """Refuse an empty measurement: it has no median.

        Raises:
            ValueError: there are no samples.
        """
        if not self.samples:
            raise ValueError("a measurement needs at least one sample")

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The least sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The greatest sample."""
        return max(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third: of one sample, itself twice."""
        return self.percentile(25), self.percentile(75)

    def percentile(self, percent: float) -> float:
        """The value that ``percent`` of the samples do not exceed, between neighbours by straight line (numpy's "linear").

        Args:
            percent: from 0 to 100.
        """
        ordered = sorted(self.samples)
        place = (len(ordered) - 1) * percent / 100
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a run was made: what a reader needs to compare, and nothing that names the machine."""

    cpu: str
    # That this process may use.
    cores: int
    memory_bytes: int
    # Instruction sets that decide how fast the kernels are, for example "avx512_vnni".
    isa: tuple[str, ...]
    system: str
    # The GPU used, if one was.
    gpu: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One experiment's records."""

    records: tuple[JsonRecord, ...] = ()
    # What a reader must know of this run of it: settings that were tried, what was chosen.
    notes: tuple[str, ...] = ()
    # Peer -> why it could not run, in one line.
    unavailable: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    # Of the CPU time that was wanted meanwhile, the share that went to other machines of the same host; None: nobody knows.
    stolen_share: float | None = None

    @classmethod
    def of(
        cls,
        records: Iterable[object],
        *,
        notes: Iterable[str] = (),
        unavailable: Mapping[str, str] | None = None,
        seconds: float = 0.0,
    ) -> Section:
        """A section of dataclass records.

        Args:
            records: instances of one dataclass whose fields JSON can hold (``Measurement`` included).
            notes: as the field.
            unavailable: as the field.
            seconds: that the experiment took.
        """
        return cls(
            records=tuple(to_json(record) for record in records),
            notes=tuple(notes),
            unavailable=dict(unavailable or {}),
            seconds=seconds,
        )

    def records_as(self, kind: type[_R]) -> list[_R]:
        """The records as instances of their dataclass.

        Raises:
            pydantic.ValidationError: they are not of that kind.
        """
        return [from_json(kind, record) for record in self.records]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one run found."""

    # ISO 8601, UTC.
    started_at: str
    mode: Mode
    # What makes such a report anew, but for the places of files; empty in a report from before it was written down.
    command: str = ""
    machine: Machine
    # Package -> version, of all that took part.
    versions: Mapping[str, str]
    # Model -> one line on it.
    models: Mapping[str, str]
    # By the experiment's name, in the order in which they ran.
    sections: Mapping[str, Section]
    format_revision: int = FORMAT_REVISION


def to_json(record: object) -> JsonRecord:
    """A dataclass as what JSON can hold."""
    made: JsonRecord = pydantic.TypeAdapter(type(record)).dump_python(record, mode="json")
    return made


def from_json(kind: type[_R], record: Mapping[str, Any]) -> _R:
    """What ``to_json`` made, back.

    Raises:
        pydantic.ValidationError: the record is not of that kind.
    """
    made: _R = pydantic.TypeAdapter(kind).validate_python(dict(record))
    return made


def write_report(report: Report, path: Path) -> None:
    """Write a report as JSON."""
    path.write_bytes(pydantic.TypeAdapter(Report).dump_json(report, indent=1) + b"\n")


def read_report(path: Path) -> Report:
    """Read what ``write_report`` wrote.

    Raises:
        ValueError: another format revision, or no report at all (``pydantic.ValidationError`` is one).
    """
    report = pydantic.TypeAdapter(Report).validate_json(path.read_bytes())
    if report.format_revision != FORMAT_REVISION:
        raise ValueError(f"the report has format revision {report.format_revision}; this reads {FORMAT_REVISION}")
    return report
