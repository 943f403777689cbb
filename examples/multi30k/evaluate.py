"""BLEU and chrF of a bundle's answers, in process or served: ``python -m examples.multi30k.evaluate --bundle DIR --data DIR``.

The answers come from the product's own command, ``onnxlate translate``, so that what is scored is what a user gets.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import sacrebleu

from examples.multi30k import data as corpus


def translate(lines: list[str], arguments: list[str]) -> list[str]:
    """What ``onnxlate translate`` answers, line by line."""
    command = [sys.executable, "-m", "serving.cli", "translate", *arguments]
    answer = subprocess.run(command, input="\n".join(lines) + "\n", stdout=subprocess.PIPE, text=True, check=True)
    return answer.stdout.splitlines()


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Translate in process, with this bundle.")
@click.option("--server", metavar="HOST:PORT", help="Translate by this server.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Multi30k, raw text.")
@click.option("--split", "splits", multiple=True, default=["val", "test_2016_flickr"], show_default=True)
@click.option("--beam-size", "beam_sizes", multiple=True, type=int, default=[1, 4], show_default=True)
def main(bundle: Path | None, server: str | None, data: Path, splits: list[str], beam_sizes: list[int]) -> None:
    """Print a table of sacreBLEU (13a, cased, detokenized) and chrF."""
    if (bundle is None) == (server is None):
        raise click.UsageError("give either --bundle or --server")
    through = ["--bundle", str(bundle)] if bundle else ["--server", str(server)]
    click.echo("| split | beam | BLEU | chrF |\n|---|---|---|---|")
    for split in splits:
        sources, references = corpus.read_lines(data, split, "en"), corpus.read_lines(data, split, "de")
        for beam_size in beam_sizes:
            output = translate(sources, [*through, "--beam-size", str(beam_size)])
            bleu, chrf = sacrebleu.corpus_bleu(output, [references]), sacrebleu.corpus_chrf(output, [references])
            click.echo(f"| {split} | {beam_size} | {bleu.score:.2f} | {chrf.score:.2f} |")


if __name__ == "__main__":
    main()
