"""``python -m benchmarks``: runs the experiments, writes JSON, a Markdown page and pictures."""

from __future__ import annotations

import datetime
import importlib
import os
import traceback
from dataclasses import replace
from pathlib import Path

import click

from benchmarks import models, peers, report
from benchmarks.experiment import BUILD, CAPTIONS, TRAINED, Experiment, Setting
from benchmarks.machine import describe_gpu, describe_machine, describe_packages, read_cpu_times
from benchmarks.process import one_line
from benchmarks.results import Mode, Precision, Report, Section
from serving.config import available_cpus

_COUNT = click.IntRange(1)
_SECONDS = click.FloatRange(min=0, min_open=True)

EXPERIMENTS = ("offline", "growth", "bound", "served")


def load_experiment(name: str) -> Experiment:
    """An experiment's module, imported when it is asked for.

    Raises:
        ImportError: a package that it needs is not installed.
    """
    module: Experiment = importlib.import_module(f"benchmarks.{name}")
    return module


def measure(names: tuple[str, ...], setting: Setting) -> tuple[dict[str, Section], dict[str, Experiment]]:
    """Every experiment's section, and the experiments; one that fails says so in its section, and the others run."""
    sections: dict[str, Section] = {}
    experiments: dict[str, Experiment] = {}
    for name in names:
        before = read_cpu_times()
        try:
            experiments[name] = load_experiment(name)
            setting.say(f"--- {experiments[name].TITLE}")
            sections[name] = experiments[name].run(setting)
        except Exception as error:  # what was measured until now is worth more than a clean exit
            setting.say(traceback.format_exc())
            sections[name] = Section(notes=(f"The experiment failed: {one_line(error)}",))
        if before is not None and (after := read_cpu_times()) is not None:
            sections[name] = replace(sections[name], stolen_share=after.stolen_since(before))
    return sections, experiments


@click.command()
@click.option("--quick", "mode", flag_value="quick", default="quick", help="Fewer cells and repetitions; minutes. The default.")
@click.option("--full", "mode", flag_value="full", help="Everything; hours.")
@click.option("--only", default=",".join(EXPERIMENTS), show_default=True, help="Experiments, by comma.")
@click.option("--peers", "chosen_peers", default="", help=f"Libraries, by comma, of {', '.join(peers.PEERS)}; default: all.")
@click.option("--models", "chosen_models", default="", help="Models, by comma; default: what the mode has.")
@click.option("--precision", "precisions", type=click.Choice(["fp32", "int8", "fp16"]), multiple=True, help="Default: all.")
@click.option("--batch", "batches", type=_COUNT, multiple=True, help="Of offline and bound; default: what the mode has.")
@click.option("--beam", "beam_sizes", type=_COUNT, multiple=True, help="Of offline, bound, served; default: what the mode has.")
@click.option("--seconds", "closed_s", type=_SECONDS, help="Of each closed loop of served; default: what the mode has.")
@click.option("--sweep-seconds", "open_s", type=_SECONDS, help="Of each rate of served; default: what the mode has.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("build/bench/report"), show_default=True)
@click.option("--build", type=click.Path(file_okay=False, path_type=Path), default=BUILD, show_default=True)
@click.option("--trained", type=click.Path(file_okay=False, path_type=Path), default=TRAINED, show_default=True)
@click.option("--captions", type=click.Path(file_okay=False, path_type=Path), default=CAPTIONS, show_default=True)
@click.option("--cores", type=click.IntRange(1), help="CPUs to use, and no others; default: all that this process may use.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(
    mode: Mode,
    only: str,
    chosen_peers: str,
    chosen_models: str,
    precisions: tuple[Precision, ...],
    batches: tuple[int, ...],
    beam_sizes: tuple[int, ...],
    closed_s: float | None,
    open_s: float | None,
    output: Path,
    build: Path,
    trained: Path,
    captions: Path,
    cores: int | None,
    device: str,
) -> None:
    """Compare onnxlate with other libraries, side by side in one run."""
    names = _chosen(only, EXPERIMENTS, "--only")
    if cores is not None:
        pin(cores)
    setting = Setting(
        mode=mode,
        build=build,
        trained=trained,
        captions=captions,
        cores=cores or available_cpus(),
        device=device,
        peers=_chosen(chosen_peers, tuple(peers.PEERS), "--peers"),
        models=_chosen(chosen_models, (models.BASE_RANDOM, models.TRAINED, models.BUNDLED), "--models"),
        precisions=precisions,
        batches=batches,
        beam_sizes=beam_sizes,
        closed_s=closed_s,
        open_s=open_s,
        say=click.echo,
    )
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    sections, experiments = measure(names, setting)
    made = Report(
        started_at=started_at,
        mode=mode,
        command=command_for(names, setting),
        machine=describe_machine(setting.cores, gpu=describe_gpu() if device == "cuda" else None),
        versions=describe_packages(),
        models={name: model.description for name, model in models.all_models(build, trained).items()},
        sections=sections,
    )
    click.echo(report.write_all(made, experiments, output))
    if not any(section.records for section in sections.values()):
        raise click.ClickException("nothing was measured; the report has the reasons")


def pin(cores: int) -> None:
    """Keep this process, and all that it starts, to the first so many of the CPUs that it may use.

    Raises:
        click.BadParameter: it may not use so many.
    """
    usable = sorted(os.sched_getaffinity(0))
    if cores > len(usable):
        raise click.BadParameter(f"this process may use {len(usable)} CPUs, not {cores}", param_hint="--cores")
    os.sched_setaffinity(0, usable[:cores])


def command_for(names: tuple[str, ...], setting: Setting) -> str:
    """The command that measures the same again; without the places of files, which are each machine's own."""
    words = ["python -m benchmarks", f"--{setting.mode}", f"--only {','.join(names)}"]
    words += [f"--peers {','.join(setting.peers)}"] if setting.peers else []
    words += [f"--models {','.join(setting.models)}"] if setting.models else []
    words += [f"--precision {precision}" for precision in setting.precisions]
    words += [f"--batch {batch}" for batch in setting.batches]
    words += [f"--beam {beam_size}" for beam_size in setting.beam_sizes]
    words += [f"--seconds {setting.closed_s:g}"] if setting.closed_s else []
    words += [f"--sweep-seconds {setting.open_s:g}"] if setting.open_s else []
    return " ".join([*words, f"--cores {setting.cores} --device {setting.device}"])


def _chosen(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"no {', '.join(unknown)}; there are {', '.join(known)}", param_hint=option)
    return names


if __name__ == "__main__":
    main()
