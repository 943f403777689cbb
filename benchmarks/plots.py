"""Pictures of what was found, as PNG. Knows matplotlib; does not know how anything was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # the backend is chosen before

from benchmarks import peers
from benchmarks.cells import Cell, speed
from benchmarks.experiment import Plot

_COLOURS = {"onnxlate": "#1f77b4", "CTranslate2": "#ff7f0e", "Hugging Face": "#2ca02c"}
# Label -> (x, y).
Lines = Mapping[str, Sequence[tuple[float, float]]]


def offline(best: Sequence[Cell], directory: Path) -> list[Plot]:
    """Bars: every library's best split, a picture for each model and precision."""
    made = []
    for model, precision in dict.fromkeys((cell.model, cell.precision) for cell in best):
        here = [cell for cell in best if (cell.model, cell.precision) == (model, precision)]
        bars = {peers.PEERS[peer]: {_label(cell): speed(cell) for cell in here if cell.peer == peer} for peer in peers.PEERS}
        plot = Plot(
            f"offline-{model}-{precision}.png", f"{model}, {precision}: sentences a second, each library at its best split"
        )
        _bars(bars, directory / plot.file_name, plot.caption)
        made.append(plot)
    return made


def _label(cell: Cell) -> str:
    return f"batch {cell.batch}\n{'greedy' if cell.beam_size == 1 else f'beam {cell.beam_size}'}"


def _bars(bars: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """Groups of bars: label of the bar -> label of the group -> height. Each group is drawn to its own highest bar."""
    bars = {name: heights for name, heights in bars.items() if heights}
    groups = list(dict.fromkeys(group for heights in bars.values() for group in heights))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.5 * len(groups)), 4), layout="constrained")
    width = 0.8 / len(bars)
    for i, (name, heights) in enumerate(bars.items()):
        places = [groups.index(group) + (i - (len(bars) - 1) / 2) * width for group in heights]
        shares = [height / max(other.get(group, 0) for other in bars.values()) for group, height in heights.items()]
        drawn = axes.bar(places, shares, width, label=name, color=_COLOURS.get(name))
        axes.bar_label(drawn, labels=[f"{height:.3g}" for height in heights.values()], fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("share of the fastest")
    axes.set_ylim(0, 1.15)
    axes.set_title(title, fontsize=10)
    axes.legend(ncols=len(bars), fontsize=8, loc="upper center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def lines(curves: Lines, path: Path, *, title: str, x_label: str, y_label: str, logarithmic_x: bool = False) -> None:
    """Curves with a point for each measurement."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
    if logarithmic_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({x for points in curves.values() for x, _ in points}), [f"{x:g}" for x in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
