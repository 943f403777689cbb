"""Draw the learning curve: ``python -m examples.multi30k.plot --work DIR``."""

from __future__ import annotations

import csv
from pathlib import Path

import click
import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


@click.command()
@click.option("--work", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="A run's state.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(__file__).with_name("learning_curve.png"), show_default=True
)
def main(work: Path, output: Path) -> None:
    """Loss on training and validation data, and validation BLEU, over the epochs."""
    with (work / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    epochs = [int(row["epoch"]) for row in rows]
    figure, losses = plt.subplots(figsize=(8, 4.5), layout="constrained")
    losses.plot(epochs, [float(row["train_loss"]) for row in rows], label="training (dropout, sampled segmentation)")
    losses.plot(epochs, [float(row["validation_loss"]) for row in rows], label="validation")
    losses.set(xlabel="epoch", ylabel="cross-entropy per token [nats]", title="Multi30k English to German")
    losses.grid(alpha=0.3)
    scored = [row for row in rows if row["validation_bleu"]]
    bleu = losses.twinx()
    bleu.plot(
        [int(row["epoch"]) for row in scored],
        [float(row["validation_bleu"]) for row in scored],
        "o--",
        color="tab:green",
        label="validation BLEU (greedy, right)",
    )
    bleu.set(ylabel="sacreBLEU")
    lines = [*losses.get_lines(), *bleu.get_lines()]
    losses.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    figure.savefig(output, dpi=120)
    click.echo(output)


if __name__ == "__main__":
    main()
