"""Average the last epochs and write the checkpoint: ``python -m examples.multi30k.ship --work DIR --output DIR``."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

from examples.multi30k.recipe import Recipe
from export.checkpoint import write_native_checkpoint
from export.model import ModelConfig
from serving.manifest import LanguagePair, TokenizerSpec

_HERE = Path(__file__).parent


def average(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of several epochs' parameters, in float32 (paper, 6.1)."""
    states = [torch.load(path, weights_only=True) for path in paths]
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


@click.command()
@click.option("--work", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="A run's state.")
@click.option("--output", type=click.Path(path_type=Path), default=_HERE / "checkpoint", show_default=True)
@click.option("--last", type=int, default=Recipe().averaged_epochs, show_default=True, help="Epochs to average.")
def main(work: Path, output: Path, last: int) -> None:
    """Write the averaged checkpoint of a training run."""
    epochs = sorted(work.glob("epoch*.pt"))[-last:]
    write_native_checkpoint(
        output,
        name="multi30k-en-de",
        config=ModelConfig.model_validate_json((work / "model.json").read_text()),
        state_dict=average(epochs),
        languages=[LanguagePair(source="en", target="de")],
        tokenizer=TokenizerSpec(kind="sentencepiece", source_model="sentencepiece.model", target_model="sentencepiece.model"),
        tokenizer_files={"sentencepiece.model": work / "sentencepiece.model"},
        samples=(_HERE / "samples.txt").read_text().splitlines(),
        dtype=torch.float16,
    )
    click.echo(f"{output}: mean of {', '.join(path.stem for path in epochs)}")


if __name__ == "__main__":
    main()
