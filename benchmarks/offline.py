"""The offline grid: how many tokens a second each library makes of the same sources, and how soon it answers a single one.

A cell is a batch, a beam and a precision. Each library runs it with several splits of the CPUs and is judged by its best
(onnxlate in quick mode by its default); every worker has one batch in flight. At batch 1 sources come one at a time, each when
the one before it is answered. CTranslate2's kernels are part of its split: at batch 1 each split runs with each of them,
otherwise with those that won a short trial.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import backend, cells, peers, plots, race, sentences
from benchmarks.cells import Cell
from benchmarks.experiment import Plot, Setting
from benchmarks.models import BASE_RANDOM, BUNDLED, TRAINED, BenchModel, all_models
from benchmarks.peers.base import Answer, Job, PeerSpec, Split
from benchmarks.process import PeerUnavailableError
from benchmarks.race import Field, Lane
from benchmarks.results import Measurement, Precision, Section
from serving.bundle import Bundle
from serving.tokenizers import load_tokenizer

TITLE = "Offline grid"
METHOD = (
    "Medians, with the least and the greatest sample in parentheses. Libraries took turns within each cell, and each is compared "
    "at its own best split of the CPUs (in quick mode onnxlate at its default)."
)

SOURCE_TOKENS, TARGET_TOKENS = 33, 32
# Of natural text.
_MAX_TARGET_TOKENS = 128
# Sources that come one at a time: of natural text, whose lengths differ, and of one length.
_SINGLE_CAPTIONS_FULL, _SINGLE_CAPTIONS_QUICK = 100, 30
_SINGLE_OF_ONE_LENGTH_FULL, _SINGLE_OF_ONE_LENGTH_QUICK = 16, 6
# Hugging Face needs long for each, and one is like any other.
_SINGLE_OF_HUGGING_FACE = 4
_FIRST_ORDINARY_ID = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch and a beam."""

    batch: int
    beam_size: int

    @property
    def one_at_a_time(self) -> bool:
        """Batch 1 is about latency."""
        return self.batch == 1

    def __str__(self) -> str:
        return f"batch {self.batch}, beam {self.beam_size}"


@dataclass(frozen=True, slots=True)
class Text:
    """What a model is given."""

    # With the end-of-sentence token.
    sources: tuple[tuple[int, ...], ...]
    # Forced; None: natural.
    target_tokens: int | None = None
    # BLEU of the targets of the first sources.
    score: Callable[[Sequence[tuple[int, ...]]], float] | None = None

    def job(self, shape: Shape, count: int) -> Job:
        """The first ``count`` sources, or all where there are fewer."""
        return Job(
            sources=self.sources[:count],
            batch=shape.batch,
            beam_size=shape.beam_size,
            min_target_tokens=self.target_tokens or 0,
            max_target_tokens=self.target_tokens or _MAX_TARGET_TOKENS,
            one_at_a_time=shape.one_at_a_time,
        )


def run(setting: Setting) -> Section:
    """Measure every cell of the mode; see the module."""
    started = time.monotonic()
    chosen = setting.models or ((BASE_RANDOM,) if setting.mode == "quick" else (BASE_RANDOM, TRAINED, BUNDLED))
    models = all_models(setting.build, setting.trained)
    measured: list[Cell] = []
    notes = [f"{name}: not there" for name in chosen if name not in models]
    unavailable: dict[str, str] = {}
    for model in (models[name] for name in chosen if name in models):
        try:
            text = text_for(model, setting)
        except PeerUnavailableError as error:
            unavailable[f"onnxlate, {model.name}"] = str(error)
            continue
        except (FileNotFoundError, ImportError) as error:
            notes.append(f"{model.name}: {error}")
            continue
        for precision in precisions(setting):
            wanted = shapes(model, precision, setting)
            if not wanted:
                continue
            with open_field(model, precision, setting) as runners:
                choice = backend.choose(runners.lanes)
                notes += [f"{model.name}, {precision}: {note}" for note in choice.notes]
                for shape in wanted:
                    lanes = choice.contenders if shape.one_at_a_time else choice.lanes
                    found, lost = measure(model, precision, shape, text, lanes, runners.never_started, setting)
                    measured += found
                    unavailable |= {f"{lane}, {model.name}, {precision}, {shape}": reason for lane, reason in lost.items()}
                    for cell in found:
                        setting.say(cells.line_on(cell))
            unavailable |= {f"{who}, {model.name}, {precision}": reason for who, reason in runners.unavailable.items()}
    return Section.of(measured, notes=dict.fromkeys(notes), unavailable=unavailable, seconds=time.monotonic() - started)


def precisions(setting: Setting) -> tuple[Precision, ...]:
    """Those that the device is good at."""
    good: tuple[Precision, ...] = ("fp16",) if setting.device == "cuda" else ("fp32", "int8")
    return tuple(precision for precision in good if not setting.precisions or precision in setting.precisions)


def shapes(model: BenchModel, precision: Precision, setting: Setting) -> list[Shape]:
    """The cells of a model and a precision: those of the mode, unless the setting names batches or beams."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    beam_sizes: tuple[int, ...] = (1, 4)
    if setting.mode == "quick" and model.is_trained:
        batches, beam_sizes = ((32,) if precision != "fp32" else ()), (1,)
    elif setting.mode == "quick":
        # Everything in fp32 takes several times as long.
        batches, beam_sizes = ((32,), (1,)) if precision == "fp32" else ((1, 32), (1, 4))
    return [Shape(batch, beam_size) for batch in setting.batches or batches for beam_size in setting.beam_sizes or beam_sizes]


def text_for(model: BenchModel, setting: Setting) -> Text:
    """Captions for a trained model, random ids for another.

    Raises:
        PeerUnavailableError: the model's tokenizer is not to be had.
        FileNotFoundError, ImportError: no captions, or nothing to score answers with.
    """
    bundle = model.open_bundle("fp16" if setting.device == "cuda" else "int8")
    tokenizer, eos_id = load_tokenizer(bundle), bundle.manifest.ids.eos
    if not model.is_trained:
        return Text(sentences.random_sources(1024, SOURCE_TOKENS, ordinary_ids(bundle), eos_id), TARGET_TOKENS)
    captions = sentences.read_captions(setting.captions)
    if setting.mode == "quick":
        captions = captions.first(200)
    bleu = sentences.bleu_scorer()

    def score(targets: Sequence[tuple[int, ...]]) -> float:
        return bleu([tokenizer.decode(target) for target in targets], captions.references[: len(targets)])

    return Text(tuple((*tokenizer.encode(source), eos_id) for source in captions.sources), score=score)


def ordinary_ids(bundle: Bundle) -> range:
    """Source ids that are no markers: these are the first few, or the last one."""
    return range(_FIRST_ORDINARY_ID, bundle.manifest.architecture.source_vocab_size - 1)


def splits_to_try(peer: str, setting: Setting) -> tuple[Split, ...]:
    """Of onnxlate in quick mode its default alone, which can only be slower than its best; otherwise all that there are."""
    if setting.mode == "quick" and peer == peers.ONNXLATE and setting.device == "cpu":
        return (peers.default_split(setting.cores),)
    return peers.splits_of(peer, setting.cores, setting.device)


def open_field(model: BenchModel, precision: Precision, setting: Setting) -> AbstractContextManager[Field]:
    """A process for every peer, split and choice of kernels."""

    def specs(peer: str) -> list[PeerSpec]:
        directory = model.directory_for(peer, precision)
        plain = [
            PeerSpec(peer=peer, directory=directory, precision=precision, split=split, device=setting.device)
            for split in splits_to_try(peer, setting)
        ]
        return [variant for spec in plain for variant in backend.variants(spec)]

    chosen = [peer for peer in peers.PEERS if not setting.peers or peer in setting.peers]
    if setting.mode == "quick" and precision == "int8":
        chosen = [peer for peer in chosen if peer != peers.HUGGING_FACE]
    return race.opened({peer: functools.partial(specs, peer) for peer in chosen})


def measure(
    model: BenchModel,
    precision: Precision,
    shape: Shape,
    text: Text,
    lanes: Sequence[Lane],
    never_started: Sequence[Lane],
    setting: Setting,
) -> tuple[list[Cell], dict[Lane, str]]:
    """One cell by everyone, and who was lost on the way, with the reason."""
    full = setting.mode == "full"

    def job_for(lane: Lane) -> Job:
        return text.job(shape, sources_for(lane.peer, shape, text, setting.cores, full=full))

    found = race.race(lanes, job_for, race.FULL if full else race.QUICK)
    splits = {(lane.peer, lane.split) for lane in lanes}
    # A backend that the library was not built with is no loss as long as another one runs the split.
    missing = [*found.lost, *(lane for lane in never_started if (lane.peer, lane.split) not in splits)]
    made = []
    for lane, answers in found.answers.items():
        lost = tuple(other.name for other in missing if other.peer == lane.peer)
        made.append(cell_of(model, precision, shape, text, lane, answers, lost))
    return made, found.lost


def sources_for(peer: str, shape: Shape, text: Text, cores: int, *, full: bool) -> int:
    """How many sources a peer is given: enough for a run of a second or so.

    Of natural text, whose lengths differ, everyone has the same ones, and all of them where they come in batches.
    """
    if text.target_tokens is None:
        if not shape.one_at_a_time:
            return len(text.sources)
        return _SINGLE_CAPTIONS_FULL if full else _SINGLE_CAPTIONS_QUICK
    if shape.one_at_a_time:
        if peer == peers.HUGGING_FACE:
            return _SINGLE_OF_HUGGING_FACE
        return _SINGLE_OF_ONE_LENGTH_FULL if full else _SINGLE_OF_ONE_LENGTH_QUICK
    if peer == peers.HUGGING_FACE:
        # It has one batch at a time.
        return shape.batch
    return shape.batch * cores * max(1, (32 if full else 8) // shape.batch)


def cell_of(
    model: BenchModel,
    precision: Precision,
    shape: Shape,
    text: Text,
    lane: Lane,
    answers: Sequence[Answer],
    lost: tuple[str, ...],
) -> Cell:
    """The figures of one lane's answers."""
    number = len(answers[-1].targets)
    latencies = tuple(latency for answer in answers for latency in answer.latencies_s)
    assert lane.process.loaded is not None
    return Cell(
        model=model.name,
        peer=lane.peer,
        precision=precision,
        split=lane.split,
        kernels=lane.kernels,
        settings=lane.process.loaded.description,
        batch=shape.batch,
        beam_size=shape.beam_size,
        one_at_a_time=shape.one_at_a_time,
        sources=number,
        tokens_per_s=Measurement(tuple(answer.target_tokens / answer.seconds for answer in answers), "tokens/s"),
        sentences_per_s=Measurement(tuple(number / answer.seconds for answer in answers), "sentences/s"),
        latency_s=Measurement(latencies) if latencies else None,
        cpu_s_per_sentence=Measurement(tuple(answer.cpu_seconds / number for answer in answers)),
        lost=lost,
        bleu=text.score(answers[-1].targets) if text.score else None,
    )


def render(section: Section) -> str:
    """Tables by model and precision; see ``Experiment``."""
    return cells.tables(section.records_as(Cell))


def plot(section: Section, directory: Path) -> Sequence[Plot]:
    """Bars by model and precision; see ``Experiment``."""
    return plots.offline(cells.best_splits(section.records_as(Cell)), directory)
