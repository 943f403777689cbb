"""The experiment: which model, which text, which servers, which settings of them are tried."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import backend, peers, race
from benchmarks.experiment import Setting
from benchmarks.models import BUNDLED, ROOT, TRAINED, BenchModel, all_models
from benchmarks.peers.base import PeerSpec, Split
from benchmarks.process import PeerUnavailableError, one_line
from benchmarks.results import Mode, Section
from benchmarks.sentences import read_captions
from benchmarks.served.point import Bench, Corpus, Times
from benchmarks.served.servers import (
    ConvertedModel,
    Knobs,
    MosecServer,
    OnnxlateServer,
    PeerOptions,
    Server,
)
from benchmarks.served.shell import SHELL_MS_TO_REACH, measure_shell
from benchmarks.served.soak import soak
from benchmarks.served.sweep import FULL, QUICK, Contender, Effort, Sweep
from serving.manifest import MarianTokenizerSpec, TokenizerSpec

TITLE = "Served"
METHOD = (
    "Each point is one run of one server; percentiles are of its requests. Both servers are up, one is loaded at a time; they "
    "take turns at every load, and who goes first alternates."
)

BEAM_SIZES: dict[Mode, tuple[int, ...]] = {"quick": (1,), "full": (1, 4)}
SAMPLES = ROOT / "examples" / "multi30k" / "samples.txt"

# Sources that a worker decodes together, at most; rows are so many times the beam.
_SOURCES = (32, 64, 16)
# The first is what an untuned run has: a wait that costs a lone client little.
_PEER_KNOBS = tuple(Knobs(batch=batch, wait_ms=wait_ms) for batch in (32, 16) for wait_ms in (2, 5))


def run(setting: Setting) -> Section:
    """Measure every point of the mode; see the package."""
    started_s = time.monotonic()
    if setting.device != "cpu":
        return Section(notes=("Served is measured on the CPU alone.",))
    model = chosen_model(setting)
    corpus = read_corpus(setting.captions)
    sweep = Sweep(Bench(model=model.name, corpus=corpus), effort_of(setting), setting.say)
    if not corpus.references:
        sweep.notes.append("No BLEU: the captions' references, or sacrebleu, are not there.")
    unavailable: dict[str, str] = {}
    peer: Peer | None = None
    if not setting.peers or peers.CTRANSLATE2 in setting.peers:
        try:
            peer = open_peer(model, setting)
            sweep.notes += peer.notes
        except PeerUnavailableError as error:
            unavailable[MosecServer.name] = str(error)
    bundle = model.bundle("int8")
    for beam_size in setting.beam_sizes or BEAM_SIZES[setting.mode]:
        sweep.run(beam_size, contenders(bundle, peer, setting.cores, beam_size))
    try:
        sweep.notes += on_our_own(bundle, corpus, setting)
    except Exception as error:  # whatever it is, the points that were measured are worth more than a clean exit
        unavailable["onnxlate's shell and soak"] = one_line(error)
    return Section.of(
        sweep.points,
        notes=(
            f"{model.name}, int8, {len(corpus.texts)} texts; {setting.cores} workers of one thread each; one of onnxlate's that "
            "is alone has all CPUs, as by default",
            *sweep.notes,
        ),
        unavailable=unavailable | sweep.unavailable,
        seconds=time.monotonic() - started_s,
    )


def effort_of(setting: Setting) -> Effort:
    """The mode's, with the times that the setting asks for."""
    effort = QUICK if setting.mode == "quick" else FULL
    return replace(
        effort,
        closed=replace(effort.closed, duration_s=setting.closed_s or effort.closed.duration_s),
        open=replace(effort.open, duration_s=setting.open_s or effort.open.duration_s),
    )


def chosen_model(setting: Setting) -> BenchModel:
    """The first of those asked for that is trained; else the trained base model, or the bundled one where that is not there.

    Raises:
        PeerUnavailableError: there is none.
    """
    models = all_models(setting.build, setting.trained)
    for name in (*setting.models, TRAINED, BUNDLED):
        if name in models and models[name].is_trained:
            return models[name]
    raise PeerUnavailableError("no trained model is there")


def read_corpus(captions: Path) -> Corpus:
    """The captions, with their references where sacrebleu is there; without captions the sentences that come with the project."""
    try:
        found = read_captions(captions)
    except FileNotFoundError:
        lines = SAMPLES.read_text(encoding="utf-8").splitlines()
        return Corpus(texts=tuple(line for line in lines if line.strip()))
    scored = importlib.util.find_spec("sacrebleu") is not None
    return Corpus(texts=found.sources, references=found.references if scored else ())


@dataclass(frozen=True, slots=True)
class Peer:
    """CTranslate2's form of the model, and how its servers are started."""

    model: ConvertedModel
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()


def open_peer(model: BenchModel, setting: Setting) -> Peer:
    """Convert the model and choose CTranslate2's kernels, by a trial with as many workers of one thread as the server has.

    Raises:
        PeerUnavailableError: a package is missing, or the model cannot be converted or run, or has a tokenizer of another kind.
    """
    if importlib.util.find_spec("mosec") is None:
        raise PeerUnavailableError("mosec is not installed")
    bundle = model.open_bundle("int8")
    tokenizer = bundle.manifest.tokenizer
    if not isinstance(tokenizer, TokenizerSpec | MarianTokenizerSpec):
        raise PeerUnavailableError(f"its program takes SentencePiece models, and {model.name} has {tokenizer.kind}")
    directory = model.ctranslate2("int8")
    spec = PeerSpec(peer=peers.CTRANSLATE2, directory=directory, precision="int8", split=Split(setting.cores, 1))
    with race.opened({peers.CTRANSLATE2: functools.partial(backend.variants, spec)}) as runners:
        kernels = backend.choose(runners.lanes)
    if not kernels.lanes:
        raise PeerUnavailableError("; ".join(runners.unavailable.values()))
    converted = ConvertedModel(
        directory=directory.resolve(),
        source_tokenizer=bundle.path(tokenizer.source_model).resolve(),
        target_tokenizer=bundle.path(tokenizer.target_model).resolve(),
    )
    return Peer(converted, kernels.lanes[0].process.spec.environment, kernels.notes)


def on_our_own(bundle: Path, corpus: Corpus, setting: Setting) -> list[str]:
    """What is measured of onnxlate alone: the shell's cost, and in full mode memory over many requests to the small model.

    Raises:
        ServerUnavailableError: the server does not start.
        PeerUnavailableError: the small model cannot be exported.
    """
    full = setting.mode == "full"
    times = Times(warmup_s=0.0, duration_s=10.0 if full else 3.0)
    costs = measure_shell(bundle, corpus, times, clients=(8, 64) if full else (64,), threads=setting.cores)
    notes = [f"Shell (at most {SHELL_MS_TO_REACH:g} ms to reach): {cost}" for cost in costs]
    models = all_models(setting.build, setting.trained)
    if full and BUNDLED in models:
        with OnnxlateServer(models[BUNDLED].bundle("int8"), Knobs(batch=64), threads=setting.cores) as server:
            notes.append(f"Soak, {BUNDLED}: {soak(server, corpus, say=setting.say)}")
    return notes


def contenders(bundle: Path, peer: Peer | None, cores: int, beam_size: int) -> list[Contender]:
    """The servers, each with the settings to try, the first being taken where none are tried."""
    rows = [Knobs(batch=sources * beam_size) for sources in _SOURCES]

    def onnxlate(knobs: Knobs) -> Server:
        return OnnxlateServer(bundle, knobs, threads=cores)

    found: list[Contender] = [(rows, onnxlate)]
    if peer is not None:
        options = PeerOptions(model=peer.model, beam_size=beam_size, workers=cores, environment=peer.environment)
        found.append((_PEER_KNOBS, functools.partial(MosecServer, options)))
    return found
