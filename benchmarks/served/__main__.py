"""``python -m benchmarks.served soak | shell | steps``: measurements of onnxlate's server and engine alone."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.experiment import Setting
from benchmarks.models import BUNDLED, TRAINED
from benchmarks.served.comparison import chosen_model, read_corpus
from benchmarks.served.point import Times
from benchmarks.served.servers import Knobs, OnnxlateServer
from benchmarks.served.shell import measure_shell
from benchmarks.served.soak import CLIENTS, REQUESTS, soak
from benchmarks.served.steps import ROWS, measure_step
from serving.config import available_cpus

_DIRECTORY = click.Path(file_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_DEFAULTS = Setting()


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Measure onnxlate's server and engine; ``python -m benchmarks --only served`` compares the server."""


@main.command("soak")
@click.option("--model", default=BUNDLED, help="A trained model of the benchmark.")
@click.option("--requests", type=_COUNT, default=REQUESTS)
@click.option("--clients", type=_COUNT, default=CLIENTS)
@click.option("--cores", type=_COUNT, default=available_cpus)
@click.option("--build", type=_DIRECTORY, default=_DEFAULTS.build)
def soak_command(model: str, requests: int, clients: int, cores: int, build: Path) -> None:
    """Send many requests and watch the server's memory."""
    setting = Setting(build=build, models=(model,), cores=cores)
    bundle = chosen_model(setting).bundle("int8")
    with OnnxlateServer(bundle, Knobs(batch=64), threads=cores) as server:
        click.echo(soak(server, read_corpus(setting.captions), requests=requests, clients=clients, say=click.echo))


@main.command("shell")
@click.option("--model", default=TRAINED, help="A trained model of the benchmark.")
@click.option("--clients", type=_COUNT, multiple=True, default=(1, 8, 64))
@click.option("--beam-size", type=_COUNT, default=1)
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=10.0, help="Of each load.")
@click.option("--cores", type=_COUNT, default=available_cpus)
@click.option("--build", type=_DIRECTORY, default=_DEFAULTS.build)
def shell_command(model: str, clients: tuple[int, ...], beam_size: int, seconds: float, cores: int, build: Path) -> None:
    """Measure CPU time a sentence outside the model's graphs."""
    setting = Setting(build=build, models=(model,), cores=cores)
    bundle = chosen_model(setting).bundle("int8")
    times = Times(warmup_s=0.0, duration_s=seconds)
    for cost in measure_shell(bundle, read_corpus(setting.captions), times, clients=clients, threads=cores, beam_size=beam_size):
        click.echo(cost)


@main.command("steps")
@click.option("--model", default=TRAINED, help="A trained model of the benchmark.")
@click.option("--rows", type=_COUNT, default=ROWS)
@click.option("--beam-size", type=_COUNT, multiple=True, default=(1, 4))
@click.option("--build", type=_DIRECTORY, default=_DEFAULTS.build)
def steps_command(model: str, rows: int, beam_size: tuple[int, ...], build: Path) -> None:
    """Measure a worker's CPU time between two runs of the decoder graph."""
    if rows < max(beam_size):
        raise click.BadParameter(f"{rows} rows have no room for a beam of {max(beam_size)}", param_hint="--rows")
    setting = Setting(build=build, models=(model,))
    bundle = chosen_model(setting).open_bundle("int8")
    for width in beam_size:
        click.echo(measure_step(bundle, beam_size=width, rows=rows))


if __name__ == "__main__":
    main()
