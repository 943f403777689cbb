"""How cost grows: with the length of target and source, the beam, the batch and the threads; and what a start costs.

onnxlate and CTranslate2 side by side, int8, random weights, forced lengths, a one-thread worker for each CPU used. One setting
is changed at a time, from a batch of 8, greedy, 32 source and 32 target tokens. CTranslate2 runs with the kernels that win a
short trial. onnxlate starts as it comes: with the second copy of its graphs that a lone request is answered by.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks import backend, peers, plots, race
from benchmarks.experiment import Plot, Setting
from benchmarks.markdown import figure, table
from benchmarks.models import BASE_RANDOM, all_models
from benchmarks.offline import ordinary_ids
from benchmarks.peers.base import Job, PeerSpec, Split
from benchmarks.process import PeerProcess, PeerUnavailableError
from benchmarks.race import Effort, Lane
from benchmarks.results import Measurement, Precision, Section
from benchmarks.sentences import random_sources
from serving.config import EngineConfig

TITLE = "How cost grows"
METHOD = (
    "Medians, with the least and the greatest sample in parentheses. Along an axis both libraries have so many workers of one "
    "thread, and took turns; a start is a fresh process each time, onnxlate's with its default use of the CPUs."
)

Axis = Literal["target tokens", "source tokens", "beam", "batch", "start"]

_COMPARED = (peers.ONNXLATE, peers.CTRANSLATE2)
_QUICK = Effort(min_seconds=0.2, min_rounds=1, max_rounds=2)
_FULL = Effort(min_seconds=2.0, min_rounds=3, max_rounds=5)
# As many rows as an engine has by default, so that the one that was loaded does the work.
_LOAD_BATCH, _LOAD_TOKENS = EngineConfig().max_rows_per_worker, 64
# What a start is measured by.
LOAD, LOADED_MEMORY, FIRST_REQUEST, LATER_REQUEST, WORKED_MEMORY, PEAK_MEMORY = (
    "load, s",
    "resident after load, MiB",
    "first request, s",
    "later requests, s",
    "resident after work, MiB",
    "resident at its peak, MiB",
)
_TIME = "s a sentence"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One figure of one library."""

    axis: Axis
    # Along the axis; nothing for a start.
    x: int | None = None
    peer: str
    workers: int
    quantity: str = _TIME
    value: Measurement


@dataclass(frozen=True, slots=True)
class Place:
    """Where on the axes a job is."""

    target_tokens: int = 32
    source_tokens: int = 32
    beam_size: int = 1
    batch: int = 8


_Step = tuple[Axis, int, Place]


def places(*, full: bool) -> list[_Step]:
    """(axis, x, place) of everything that is measured."""
    start = Place()
    lengths = (8, 16, 32, 64, 128, 256)
    made: list[_Step] = []
    made += [("target tokens", x, replace(start, target_tokens=x)) for x in (lengths[1:] if full else (16, 64))]
    made += [("source tokens", x, replace(start, source_tokens=x)) for x in (lengths if full else (8, 64))]
    made += [("beam", x, replace(start, beam_size=x)) for x in (range(1, 9) if full else (1, 4))]
    made += [("batch", x, replace(start, batch=x)) for x in ((1, 2, 4, 8, 16, 32, 64, 128) if full else (1, 32))]
    return made


def run(setting: Setting) -> Section:
    """Measure along each axis with one worker and with one for each CPU, then starts; see the module."""
    started = time.monotonic()
    full = setting.mode == "full"
    model = all_models(setting.build, setting.trained)[BASE_RANDOM]
    precision: Precision = "fp16" if setting.device == "cuda" else "int8"
    compared = [peer for peer in _COMPARED if not setting.peers or peer in setting.peers]
    found: list[Point] = []
    unavailable: dict[str, str] = {}
    workers = (1,) if setting.device == "cuda" else tuple(dict.fromkeys((1, setting.cores)))
    if not full:
        workers = workers[-1:]
    try:
        bundle = model.open_bundle(precision)
    except PeerUnavailableError as error:
        return Section(unavailable={peers.ONNXLATE: str(error)})
    job_at = functools.partial(job_for, ids=ordinary_ids(bundle), eos_id=bundle.manifest.ids.eos)

    def specs(peer: str, workers: int) -> list[PeerSpec]:
        directory = model.directory_for(peer, precision)
        split = Split(workers, 1)
        return backend.variants(PeerSpec(peer=peer, directory=directory, precision=precision, split=split, device=setting.device))

    notes: list[str] = []
    to_start: dict[str, PeerSpec] = {}
    for number in workers:
        with race.opened({peer: functools.partial(specs, peer, number) for peer in compared}) as runners:
            choice = backend.choose(runners.lanes)
            notes += choice.notes
            # What is not measured is not to take memory either.
            for lane in runners.lanes:
                if lane not in choice.lanes:
                    lane.process.close()
            points, lost = along_axes(choice.lanes, places(full=full), number, job_at, _FULL if full else _QUICK, setting.say)
        found += points
        unavailable |= runners.unavailable | lost
        to_start = {lane.peer: lane.process.spec for lane in choice.lanes}
    for spec in to_start.values():
        if spec.peer == peers.ONNXLATE and setting.device == "cpu":
            spec = replace(spec, split=peers.default_split(spec.split.workers))
        try:
            found += starts(spec, job_at, times=5 if full else 1)
        except PeerUnavailableError as error:
            unavailable[f"{spec.peer}, start"] = str(error)
    return Section.of(found, notes=notes, unavailable=unavailable, seconds=time.monotonic() - started)


def job_for(place: Place, batches: int, *, ids: range, eos_id: int) -> Job:
    """So many batches at a place."""
    return Job(
        sources=random_sources(place.batch * batches, place.source_tokens, ids, eos_id),
        batch=place.batch,
        beam_size=place.beam_size,
        min_target_tokens=place.target_tokens,
        max_target_tokens=place.target_tokens,
    )


def along_axes(
    lanes: Sequence[Lane],
    steps: Iterable[_Step],
    workers: int,
    job_at: Callable[[Place, int], Job],
    effort: Effort,
    say: Callable[[str], None],
) -> tuple[list[Point], dict[str, str]]:
    """Everyone's time a sentence at each place, a batch for each worker; and who was lost where, with the reason.

    A place that two axes share is measured once.
    """
    measured: dict[Place, dict[Lane, Measurement]] = {}
    found = []
    unavailable: dict[str, str] = {}
    for axis, x, place in steps:
        if place not in measured:
            job = job_at(place, workers)
            run = race.race(lanes, race.same_for_all(job), effort)
            measured[place] = {
                lane: Measurement(tuple(answer.seconds / len(job.sources) for answer in some))
                for lane, some in run.answers.items()
            }
            unavailable |= {f"{lane}, {axis} {x}": reason for lane, reason in run.lost.items()}
        for lane, value in measured[place].items():
            found.append(Point(axis=axis, x=x, peer=lane.peer, workers=workers, value=value))
            say(f"{axis} {x}, {workers} workers: {peers.PEERS[lane.peer]} {value.median * 1e3:.1f} ms a sentence")
    return found, unavailable


def starts(spec: PeerSpec, job_at: Callable[[Place, int], Job], *, times: int) -> list[Point]:
    """Fresh processes: loading, the first request, later ones, memory after some work.

    Raises:
        PeerUnavailableError: it cannot be loaded, or fails.
    """
    workers = spec.split.workers
    single = replace(job_at(Place(batch=1), 4), one_at_a_time=True)
    work = job_at(Place(batch=_LOAD_BATCH, source_tokens=_LOAD_TOKENS, target_tokens=_LOAD_TOKENS), workers)
    samples: dict[str, list[float]] = {}
    for _ in range(times):
        with PeerProcess(spec) as process:
            assert process.loaded is not None
            few, many = process.translate(single), process.translate(work)
            seen = {
                LOAD: process.loaded.load_s,
                FIRST_REQUEST: few.latencies_s[0],
                LATER_REQUEST: Measurement(few.latencies_s[1:]).median,
                LOADED_MEMORY: process.loaded.rss_bytes / 2**20,
                WORKED_MEMORY: many.rss_bytes / 2**20,
                PEAK_MEMORY: many.peak_rss_bytes / 2**20,
            }
            for quantity, value in seen.items():
                samples.setdefault(quantity, []).append(value)
    return [
        Point(
            axis="start",
            peer=spec.peer,
            workers=workers,
            quantity=quantity,
            value=Measurement(tuple(values), quantity.split(", ")[1]),
        )
        for quantity, values in samples.items()
    ]


def render(section: Section) -> str:
    """A table for each axis; see ``Experiment``."""
    points = section.records_as(Point)
    parts = []
    for axis in dict.fromkeys(point.axis for point in points):
        here = [point for point in points if point.axis == axis]
        parts.append(f"### {axis.capitalize()}\n\n" + (_starts_table(here) if axis == "start" else _axis_table(axis, here)))
    return "\n\n".join(parts)


def _axis_table(axis: str, points: Sequence[Point]) -> str:
    compared = list(dict.fromkeys(point.peer for point in points))
    by_place = {(point.workers, point.x, point.peer): point.value for point in points}
    rows = []
    for workers, x in dict.fromkeys((point.workers, point.x) for point in points):
        values = [by_place.get((workers, x, peer)) for peer in compared]
        ours, theirs = (by_place.get((workers, x, peer)) for peer in _COMPARED)
        ratio = f"{theirs.median / ours.median:.2f}" if ours and theirs else ""
        rows.append((str(workers), str(x), *(figure(_in_ms(value)) if value else "" for value in values), ratio))
    heads = ("workers", axis, *(f"{peers.PEERS[peer]}, ms a sentence" for peer in compared), "speed / CTranslate2")
    return table(heads, rows)


def _starts_table(points: Sequence[Point]) -> str:
    compared = list(dict.fromkeys(point.peer for point in points))
    values = {(point.quantity, point.peer): point.value for point in points}
    rows = [
        (quantity, *(figure(value) if (value := values.get((quantity, peer))) else "" for peer in compared))
        for quantity in dict.fromkeys(point.quantity for point in points)
    ]
    return table(("", *(peers.PEERS[peer] for peer in compared)), rows)


def _in_ms(value: Measurement) -> Measurement:
    return Measurement(tuple(1e3 * sample for sample in value.samples), "ms")


def plot(section: Section, directory: Path) -> Sequence[Plot]:
    """Curves for each axis; see ``Experiment``."""
    points = section.records_as(Point)
    made = []
    for axis in dict.fromkeys(point.axis for point in points if point.axis != "start"):
        curves: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            if point.axis == axis and point.x is not None:
                label = f"{peers.PEERS[point.peer]}, {point.workers} {'worker' if point.workers == 1 else 'workers'}"
                curves.setdefault(label, []).append((point.x, point.value.median * 1e3))
        picture = Plot(f"growth-{axis.replace(' ', '-')}.png", f"Time a sentence by {axis}")
        path = directory / picture.file_name
        plots.lines(curves, path, title=picture.caption, x_label=axis, y_label="ms a sentence", logarithmic_x=True)
        made.append(picture)
    return made
