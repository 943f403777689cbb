"""Markdown, from figures. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import Measurement


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; empty when it has no rows."""
    lines = [_row(row) for row in rows]
    if not lines:
        return ""
    return "\n".join((_row(heads), "|" + "---|" * len(heads), *lines))


def figure(measurement: Measurement) -> str:
    """The median, and from where to where the samples go."""
    return f"{number(measurement.median)} ({number(measurement.low)} to {number(measurement.high)})"


def number(value: float) -> str:
    """Three digits that mean something, or all digits before the point."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
