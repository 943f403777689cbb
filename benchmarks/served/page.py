"""Tables and pictures of load points. Knows what is to be reached; does not know how anything was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.experiment import Plot
from benchmarks.markdown import number, table
from benchmarks.results import Section
from benchmarks.served.ladder import SATURATED_P95_S, best_of
from benchmarks.served.point import LoadPoint
from benchmarks.served.servers import MosecServer, OnnxlateServer

_OURS, _PEER = OnnxlateServer.name, MosecServer.name
# Ours over the peer's.
_GOODPUT_TO_REACH, _THROUGHPUT_TO_REACH, _P50_TO_REACH = 2.0, 1.3, 0.6
_MOST_CLIENTS = 64
_NONE = "-"

# How a column is written: its head, and its cell for a point.
_Column = tuple[str, Callable[[LoadPoint], str]]


def render(section: Section) -> str:
    """Markdown: what is compared, then every point, by model and beam; see ``Experiment``."""
    points = section.records_as(LoadPoint)
    parts = []
    for model, beam_size in dict.fromkeys((point.model, point.beam_size) for point in points):
        here = [point for point in points if (point.model, point.beam_size) == (model, beam_size)]
        parts.append(f"### {model}, {search_name(beam_size)}")
        parts.append(comparison(here))
        closed = [point for point in here if point.rate_per_s is None]
        parts.append(_points("Closed loop: each client sends its next text when it was answered.", _load_closed, closed))
        opened = sorted((point for point in here if point.rate_per_s is not None), key=_by_rate)
        parts.append(_points("Open loop: random arrivals at a rate; latency from the time a text was due.", _load_open, opened))
    return "\n\n".join(part for part in parts if part)


def search_name(beam_size: int) -> str:
    """As a reader knows it."""
    return "greedy" if beam_size == 1 else f"beam {beam_size}"


def comparison(points: Sequence[LoadPoint]) -> str:
    """Ours and the peer's, side by side, with what is to be reached; of points of one model and beam."""
    limit_ms = 1e3 * points[0].limit_s
    rows = [
        (f"goodput at p95 <= {limit_ms:.0f} ms, /s", best_goodput, f">= {_GOODPUT_TO_REACH:g}"),
        (
            f"{_MOST_CLIENTS} clients, sentences/s",
            _of_closed(_MOST_CLIENTS, lambda p: p.throughput_per_s),
            f">= {_THROUGHPUT_TO_REACH:g}",
        ),
        ("one client, p50, ms", _of_closed(1, lambda p: _times_1000(p.p50_s)), f"<= {_P50_TO_REACH:g}"),
        (f"memory after {_MOST_CLIENTS} clients, MiB", _of_closed(_MOST_CLIENTS, lambda p: p.memory_bytes / 2**20), ""),
        (
            f"CPU a sentence, {_MOST_CLIENTS} clients, ms",
            _of_closed(_MOST_CLIENTS, lambda p: _times_1000(p.cpu_s_per_sentence)),
            "",
        ),
    ]
    lines = []
    for what, figure_of, target in rows:
        ours, theirs = (figure_of([p for p in points if p.server == server]) for server in (_OURS, _PEER))
        ratio = number(ours / theirs) if ours is not None and theirs else _NONE
        lines.append((what, _number(ours), _number(theirs), ratio, target))
    return table(("", _OURS, _PEER, "ratio", "to reach"), lines)


def best_goodput(points: Sequence[LoadPoint]) -> float | None:
    """Goodput at the highest rate that was served well, of one server's points; None where none was."""
    opened = [point for point in points if point.rate_per_s is not None]
    best = best_of([point.as_rate for point in opened], opened[0].limit_s) if opened else None
    return None if best is None else best.goodput_per_s


def _of_closed(clients: int, figure_of: Callable[[LoadPoint], float | None]) -> Callable[[Sequence[LoadPoint]], float | None]:
    def find(points: Sequence[LoadPoint]) -> float | None:
        return next((figure_of(p) for p in points if p.clients == clients and not p.streamed), None)

    return find


_COLUMNS: tuple[_Column, ...] = (
    ("server", lambda p: f"{p.server} ({p.settings})"),
    ("answers/s", lambda p: number(p.throughput_per_s)),
    ("good/s", lambda p: number(p.goodput_per_s)),
    ("p50, ms", lambda p: _number(_times_1000(p.p50_s))),
    ("p95, ms", lambda p: _number(_times_1000(p.p95_s))),
    ("p99, ms", lambda p: _number(_times_1000(p.p99_s))),
    ("first token, ms", lambda p: _number(_times_1000(p.first_token_s))),
    ("mean batch", lambda p: _number(p.mean_batch)),
    ("CPU a sentence, ms", lambda p: _number(_times_1000(p.cpu_s_per_sentence))),
    ("memory, MiB", lambda p: f"{p.memory_bytes / 2**20:.0f}"),
    ("BLEU (texts)", lambda p: _NONE if p.bleu is None else f"{p.bleu:.1f} ({p.texts})"),
    ("texts answered in two ways", lambda p: str(p.texts_with_several_answers)),
    ("errors", lambda p: ", ".join(f"{kind} {count}" for kind, count in p.errors.items()) or _NONE),
    (
        "generator: CPU a request, late p95, ms",
        lambda p: f"{_number(1e3 * p.generator_cpu_s_per_request)}, {_number(_times_1000(p.generator_late_p95_s))}",
    ),
    ("CPUs of idle servers", lambda p: f"{p.idle_cpus:.2f}"),
)


def _load_closed(point: LoadPoint) -> str:
    return f"{point.clients}{', streamed' if point.streamed else ''}"


def _load_open(point: LoadPoint) -> str:
    return f"{point.rate_per_s:g}/s"


def _by_rate(point: LoadPoint) -> float:
    return point.rate_per_s or 0.0


def _points(title: str, load_of: Callable[[LoadPoint], str], points: Iterable[LoadPoint]) -> str:
    rows = [(load_of(point), *(cell(point) for _, cell in _COLUMNS)) for point in points]
    return f"{title}\n\n{table(('load', *(head for head, _ in _COLUMNS)), rows)}" if rows else ""


def _times_1000(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _number(value: float | None) -> str:
    return _NONE if value is None else number(value)


def plot(section: Section, directory: Path) -> list[Plot]:
    """Two pictures for each model and beam: p95 and goodput over the rate offered; see ``Experiment``."""
    from benchmarks.plots import lines

    opened = [point for point in section.records_as(LoadPoint) if point.rate_per_s is not None]
    plots = []
    for model, beam_size in dict.fromkeys((point.model, point.beam_size) for point in opened):
        here = sorted((p for p in opened if (p.model, p.beam_size) == (model, beam_size)), key=_by_rate)
        pictures: tuple[tuple[str, str, Callable[[LoadPoint], float | None]], ...] = (
            # A saturated server's tail goes to seconds and would flatten all that is below.
            (
                "p95",
                f"p95, ms, up to {SATURATED_P95_S:g} s",
                lambda p: _times_1000(min(p.p95_s, SATURATED_P95_S)) if p.p95_s is not None else None,
            ),
            ("goodput", f"answers within {1e3 * here[0].limit_s:.0f} ms, /s", lambda p: p.goodput_per_s),
        )
        for name, y_label, figure_of in pictures:
            made = Plot(
                f"served-{model}-beam{beam_size}-{name}.png", f"{model}, {search_name(beam_size)}: {y_label}, by offered rate"
            )
            curves = {
                server: [(_by_rate(p), y) for p in here if p.server == server and (y := figure_of(p)) is not None]
                for server in dict.fromkeys(p.server for p in here)
            }
            lines(curves, directory / made.file_name, title=made.caption, x_label="offered, texts a second", y_label=y_label)
            plots.append(made)
    return plots
