"""The limit: how long the matrix products alone take, and how long it takes to read what a step must read; what we reach of it.

For each cell three things are measured beside each other on the same threads: whole translations by onnxlate, one pass of the
same products and nothing else, and the bandwidth of the memory. The bound is the time of the products or that of the bytes,
whichever is longer, summed over the encoder and the decoder steps. It leaves out attention, norms, search and everything else
that a translation needs, so that nothing reaches it.

Caches larger than the weights make the bytes cheaper than memory: then the products' own time, measured with the weights where
they lie, is the one that counts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peers, plots, race
from benchmarks.experiment import Plot, Setting
from benchmarks.markdown import number, table
from benchmarks.models import BASE_RANDOM, BenchModel, all_models, aside
from benchmarks.offline import SOURCE_TOKENS, TARGET_TOKENS, Shape, precisions, shapes, text_for, waves
from benchmarks.peers.base import PeerSpec, Split
from benchmarks.process import PeerUnavailableError
from benchmarks.products import ProductSession, Sizes, encoder_products, read_bandwidth, step_products, weight_bytes
from benchmarks.results import Measurement, Precision, Section
from export.checkpoint import read_checkpoint
from serving.config import EngineConfig

TITLE = "How near to the limit"

# Of the products, within a budget of about so many rows times passes.
_ROWS_BUDGET = 8192
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What bounds one cell: a batch of ``batch`` sources on each of ``workers`` threads, all lengths forced."""

    model: str
    precision: Precision
    batch: int
    beam_size: int
    # 1 where sources come one at a time.
    workers: int
    source_tokens: int
    target_tokens: int
    # One batch: of the encoder's products, and of one decoder step's, with all workers at it at once.
    encoder_products_s: float
    step_products_s: float
    # One batch's, of every worker.
    encoder_bytes: int
    step_bytes: int
    bandwidth_bytes_per_s: float
    # One batch, whole translations by onnxlate.
    measured_s: Measurement

    @property
    def encoder_s(self) -> float:
        """The encoder's bound."""
        return max(self.encoder_products_s, self.encoder_bytes * self.workers / self.bandwidth_bytes_per_s)

    @property
    def step_s(self) -> float:
        """A decoder step's bound."""
        return max(self.step_products_s, self.step_bytes * self.workers / self.bandwidth_bytes_per_s)

    @property
    def bound_s(self) -> float:
        """One batch's bound."""
        return self.encoder_s + self.target_tokens * self.step_s

    @property
    def share(self) -> float:
        """Of the bound that is reached; 1 would be all of it."""
        return self.bound_s / self.measured_s.median


def step_bytes(sizes: Sizes, precision: Precision, *, batch: int, beam_size: int, source_tokens: int, target_tokens: int) -> int:
    """Bytes that one worker's decoder step must read: weights, and keys and values of all layers.

    Each row reads its own target's keys and values, of half of the target on the mean; each source's are read once for its beams.
    """
    per_token = 2 * sizes.decoder_layers * sizes.d_model * _FLOAT_BYTES
    self_cache = batch * beam_size * per_token * (target_tokens + 1) // 2
    cross_cache = batch * source_tokens * per_token
    return weight_bytes(step_products(sizes), precision) + self_cache + cross_cache


def run(setting: Setting) -> Section:
    """Measure every cell of the model with random weights; see the module."""
    started = time.monotonic()
    if setting.device != "cpu":
        return Section(notes=("The limit is measured on CPUs only.",))
    model = all_models(setting.build, setting.trained)[BASE_RANDOM]
    found: list[Limit] = []
    unavailable: dict[str, str] = {}
    for precision in precisions(setting):
        try:
            found += limits_of(model, precision, setting)
        except PeerUnavailableError as error:
            unavailable[f"onnxlate, {precision}"] = str(error)
    return Section.of(found, unavailable=unavailable, seconds=time.monotonic() - started)


def limits_of(model: BenchModel, precision: Precision, setting: Setting) -> list[Limit]:
    """The cells of one precision.

    Raises:
        PeerUnavailableError: onnxlate does not run.
    """
    directory = model.bundle(precision)
    text = text_for(model, setting)
    sizes = aside(sizes_of, model.marian())
    effort = race.FULL if setting.mode == "full" else race.QUICK
    found = []
    for shape in shapes(model, precision, setting):
        workers = 1 if shape.one_at_a_time else setting.cores
        spec = PeerSpec(peer=peers.ONNXLATE, directory=directory, precision=precision, split=Split(workers, 1))
        with race.opened({peers.ONNXLATE: functools.partial(list, [spec])}) as runners:
            before = aside(time_products, sizes, precision, shape, workers)
            job = text.job(shape, workers, waves=waves(shape, text, full=setting.mode == "full"))
            answers = [answer for some in race.race(runners, race.same_for_all(job), effort).values() for answer in some]
            after = aside(time_products, sizes, precision, shape, workers)
        if not answers:
            raise PeerUnavailableError("; ".join(runners.unavailable.values()))
        batches = len(job.sources) / (shape.batch * workers)
        limit = Limit(
            model=model.name,
            precision=precision,
            batch=shape.batch,
            beam_size=shape.beam_size,
            workers=workers,
            source_tokens=SOURCE_TOKENS,
            target_tokens=TARGET_TOKENS,
            # Noise only adds to a time: of two, the lesser is nearer to the limit.
            encoder_products_s=min(before.encoder_s, after.encoder_s),
            step_products_s=min(before.step_s, after.step_s),
            encoder_bytes=weight_bytes(encoder_products(sizes), precision),
            step_bytes=step_bytes(
                sizes,
                precision,
                batch=shape.batch,
                beam_size=shape.beam_size,
                source_tokens=SOURCE_TOKENS,
                target_tokens=TARGET_TOKENS,
            ),
            bandwidth_bytes_per_s=max(before.bandwidth_bytes_per_s, after.bandwidth_bytes_per_s),
            measured_s=Measurement(tuple(answer.seconds / batches for answer in answers)),
        )
        found.append(limit)
        setting.say(f"{precision} batch {shape.batch} beam {shape.beam_size}: {limit.share:.0%} of the limit")
    return found


def sizes_of(marian: Path) -> Sizes:
    """What decides the products of a Marian directory's model."""
    config = read_checkpoint(marian).config
    return Sizes(
        d_model=config.d_model,
        encoder_d_ff=config.encoder_d_ff,
        decoder_d_ff=config.decoder_d_ff,
        encoder_layers=config.num_encoder_layers,
        decoder_layers=config.num_decoder_layers,
        vocabulary=config.target_vocab_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductTimes:
    """Of one batch, on every worker at once."""

    encoder_s: float
    step_s: float
    bandwidth_bytes_per_s: float


def time_products(sizes: Sizes, precision: Precision, shape: Shape, workers: int) -> ProductTimes:
    """Time the products of one batch. The encoder's go in parts of what an engine encodes at once."""
    rows = shape.batch * SOURCE_TOKENS
    part = min(rows, EngineConfig(threads=workers).encoder_batch_tokens)
    encoder = ProductSession(encoder_products(sizes), precision)
    encoder_s = encoder.seconds(part, threads=workers, repetitions=max(2, _ROWS_BUDGET // 4 // part)) * rows / part
    del encoder
    step_rows = shape.batch * shape.beam_size
    step = ProductSession(step_products(sizes), precision)
    step_s = step.seconds(step_rows, threads=workers, repetitions=max(10, min(100, _ROWS_BUDGET // step_rows)))
    return ProductTimes(encoder_s=encoder_s, step_s=step_s, bandwidth_bytes_per_s=read_bandwidth(threads=workers))


def render(section: Section) -> str:
    """A table; see ``Experiment``."""
    rows = [
        (
            limit.precision,
            str(limit.batch),
            str(limit.beam_size),
            str(limit.workers),
            number(limit.encoder_products_s * 1e3),
            number(limit.step_products_s * 1e3),
            f"{limit.step_bytes / 2**20:.0f}",
            number(limit.step_bytes * limit.workers / limit.bandwidth_bytes_per_s * 1e3),
            number(limit.bound_s * 1e3),
            number(limit.measured_s.median * 1e3),
            f"{limit.share:.0%}",
        )
        for limit in section.records_as(Limit)
    ]
    heads = (
        "precision",
        "batch",
        "beam",
        "workers",
        "encoder products, ms",
        "step products, ms",
        "step reads, MiB a worker",
        "reading takes, ms",
        "bound, ms a batch",
        "measured, ms a batch",
        "share reached",
    )
    limits = section.records_as(Limit)
    bandwidth = max((limit.bandwidth_bytes_per_s for limit in limits), default=0.0)
    explained = (
        f"{SOURCE_TOKENS} source and {TARGET_TOKENS} target tokens. The bound is the longer of products and reading, for the "
        f"encoder and for each step; memory is read at up to {bandwidth / 1e9:.1f} GB/s. Weights that stay in a cache are read "
        "faster; the products' own time, measured with the weights where they lie, says how fast."
    )
    return table(heads, rows) + "\n\n" + explained


def plot(section: Section, directory: Path) -> Sequence[Plot]:
    """The shares; see ``Experiment``."""
    made = Plot("bound.png", "Share of the bound that is reached")
    curves: dict[str, list[tuple[float, float]]] = {}
    for limit in section.records_as(Limit):
        label = f"{limit.precision}, {'greedy' if limit.beam_size == 1 else f'beam {limit.beam_size}'}"
        curves.setdefault(label, []).append((limit.batch, limit.share))
    plots.lines(curves, directory / made.file_name, title=made.caption, x_label="batch", y_label="share", logarithmic_x=True)
    return [made]
