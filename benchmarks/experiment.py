"""What an experiment is to the program that runs all of them and to the report that shows them.

An experiment is a module (or package) with these names. Each has records of its own, a frozen dataclass, that it alone turns
into tables and plots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.results import Mode, Precision, Section

BUILD = Path("build/bench")
TRAINED = Path("../shared/models/multi30k-base-en-de")
CAPTIONS = Path("../shared/data/multi30k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the user asked for."""

    mode: Mode = "quick"
    # Models, bundles and whatever else is made once; see ``benchmarks.models``.
    build: Path = BUILD
    # The Marian directory of the trained base model, and captions with references; either may be missing.
    trained: Path = TRAINED
    captions: Path = CAPTIONS
    # CPUs to use.
    cores: int = 1
    device: str = "cpu"
    # Peers to run; all where it is empty.
    peers: tuple[str, ...] = ()
    # Models to run; the experiment's own choice where it is empty.
    models: tuple[str, ...] = ()
    # Precisions to run; all that the device is good at where it is empty.
    precisions: tuple[Precision, ...] = ()
    # Batches of the offline grid and the bound, and beams of these and of the served comparison; the mode's where they are empty.
    batches: tuple[int, ...] = ()
    beam_sizes: tuple[int, ...] = ()
    # Of the served comparison, what counts of each closed loop and of each rate; the mode's where they are left out.
    closed_s: float | None = None
    open_s: float | None = None
    # Called with a line each time something was measured.
    say: Callable[[str], None] = field(default=print)


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of a section."""

    # Within the report's directory.
    file_name: str
    caption: str


class Experiment(Protocol):
    """A module that measures one thing."""

    TITLE: str
    # How its figures were made and what they are, in one line.
    METHOD: str

    def run(self, setting: Setting) -> Section:
        """Measure. A peer that cannot run is named in the section; only a fault of our own raises."""

    def render(self, section: Section) -> str:
        """Markdown below the section's heading, from the records alone."""

    def plot(self, section: Section, directory: Path) -> Sequence[Plot]:
        """Write PNG files into ``directory``."""
