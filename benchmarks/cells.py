"""What the offline grid found of one setting, how the best split is chosen, and the tables.

Knows figures; does not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks import peers
from benchmarks.markdown import figure, table
from benchmarks.peers.base import Split
from benchmarks.results import Measurement, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One library's figures for one setting and one split."""

    model: str
    peer: str
    precision: Precision
    split: Split
    # CTranslate2's; empty for the others.
    kernels: str = ""
    settings: str
    batch: int
    beam_size: int
    # One source in flight, instead of a batch for each worker.
    one_at_a_time: bool
    sources: int
    tokens_per_s: Measurement
    sentences_per_s: Measurement
    # Of each source, from all repetitions; None where they were not timed one by one.
    latency_s: Measurement | None = None
    cpu_s_per_sentence: Measurement
    # Of the same library in this setting, what had no answer, and would perhaps have been faster.
    lost: tuple[str, ...] = ()
    # Of the last repetition's answers, where there are references.
    bleu: float | None = None


def line_on(cell: Cell) -> str:
    """What is said of a cell when it was measured."""
    return (
        f"{cell.model} {cell.precision} batch {cell.batch} beam {cell.beam_size}: {peers.PEERS[cell.peer]} {_lane_of(cell)}: "
        f"{cell.tokens_per_s.median:.0f} tokens/s, {cell.sentences_per_s.median:.1f} sentences/s"
    )


def best_splits(cells: Iterable[Cell]) -> list[Cell]:
    """Of the cells that differ in nothing but split and kernels, the fastest; in the order of the first of each."""
    best: dict[tuple[object, ...], Cell] = {}
    for cell in cells:
        key = (cell.model, cell.precision, cell.batch, cell.beam_size, cell.one_at_a_time, cell.peer)
        held = best.get(key)
        if held is None or speed(cell) > speed(held):
            best[key] = cell
    return list(best.values())


def speed(cell: Cell) -> float:
    """What two libraries are compared by: sentences a second, by the median latency where sources came one at a time."""
    return 1 / cell.latency_s.median if cell.latency_s else cell.sentences_per_s.median


def ratio(ours: Cell, theirs: Cell) -> float:
    """How many times as fast ``ours`` is."""
    return speed(ours) / speed(theirs)


def tables(cells: Sequence[Cell]) -> str:
    """Markdown: for each model and precision what everyone's best split reaches, then every split that was tried."""
    best = best_splits(cells)
    parts = []
    for model, precision in dict.fromkeys((cell.model, cell.precision) for cell in best):
        here = [cell for cell in best if (cell.model, cell.precision) == (model, precision)]
        parts.append(f"### {model}, {precision}\n\n{_best_table(here)}")
    if parts:
        rows = [
            (
                cell.model,
                cell.precision,
                *_setting_of(cell),
                peers.PEERS[cell.peer],
                _lane_of(cell),
                str(cell.sources),
                figure(cell.tokens_per_s),
                figure(cell.sentences_per_s),
                f"{cell.cpu_s_per_sentence.median * 1e3:.1f}",
                cell.settings,
            )
            for cell in cells
        ]
        heads = ("model", "precision", "batch", "beam", "library", "workers x threads", "sources", "tokens/s", "sentences/s")
        parts.append("### Every split that was tried\n\n" + table((*heads, "CPU ms a sentence", "settings"), rows))
    return "\n\n".join(parts)


def _best_table(best: Sequence[Cell]) -> str:
    """One row a setting and library, with its ratio to CTranslate2."""
    rows = []
    for cell in best:
        latency = cell.latency_s
        rows.append(
            (
                *_setting_of(cell),
                peers.PEERS[cell.peer],
                _lane_of(cell),
                str(cell.sources),
                figure(cell.tokens_per_s),
                figure(cell.sentences_per_s),
                f"{latency.median * 1e3:.1f} / {latency.percentile(95) * 1e3:.1f}" if latency else "",
                _ratio_to_ctranslate2(cell, best),
                "" if cell.bleu is None else f"{cell.bleu:.2f}",
            )
        )
    heads = ("batch", "beam", "library", "best split", "sources", "tokens/s", "sentences/s", "p50 / p95 ms")
    return table((*heads, "speed / CTranslate2", "BLEU"), rows)


def _ratio_to_ctranslate2(cell: Cell, best: Sequence[Cell]) -> str:
    """Empty where CTranslate2 did not run; where one of its lanes was lost, that, because its best may be among them."""
    peer = next((one for one in best if one.peer == peers.CTRANSLATE2 and _setting_of(one) == _setting_of(cell)), None)
    if peer is None:
        return ""
    return f"none: CTranslate2 lost {'; '.join(peer.lost)}" if peer.lost else f"{ratio(cell, peer):.2f}"


def _lane_of(cell: Cell) -> str:
    return f"{cell.split}, {cell.kernels}" if cell.kernels else str(cell.split)


def _setting_of(cell: Cell) -> tuple[str, str]:
    return f"{cell.batch}{', one at a time' if cell.one_at_a_time else ''}", str(cell.beam_size)
