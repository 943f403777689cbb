"""A bound of the runtime's own products: how long ONNX Runtime takes for a translation's matrix products alone, or for reading
what a step must read, whichever is longer; and what share of it onnxlate reaches.

For each cell three things are measured beside each other on as many threads: whole translations, one pass of the same products
and nothing else, and how fast that many bytes are read again and again, weights shared and caches apart. The bound is summed over
the encoder and the decoder steps. It leaves out attention, norms, search and everything else that a translation needs. It is no
limit of the hardware: other products may be faster, and where a share exceeds 1 a translation found the weights nearer than the
measurements did, and the bound is too loose to say anything.
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
from benchmarks.offline import SOURCE_TOKENS, TARGET_TOKENS, Shape, Text, precisions, shapes, sources_for, text_for
from benchmarks.peers.base import PeerSpec, Split
from benchmarks.process import PeerUnavailableError
from benchmarks.products import (
    ELEMENT_BYTES,
    ProductSession,
    Sizes,
    encoder_products,
    read_bandwidth,
    step_products,
    weight_bytes,
)
from benchmarks.results import Measurement, Precision, Section
from export.checkpoint import read_checkpoint
from serving.config import EngineConfig

TITLE = "Share of the bound of the runtime's own products"
METHOD = (
    "Medians of whole translations over the best time of products and reading, which were measured before and after them, by one "
    "library alone, with one thread for each worker."
)

# Of the products, within a budget of about so many rows times passes.
_ROWS_BUDGET = 8192


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
    # Of all workers together.
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
        """Of the bound that is reached; above 1 the bound is too loose."""
        return self.bound_s / self.measured_s.median

    def __str__(self) -> str:
        return f"{self.share:.0%}{', too loose' if self.share > 1 else ''}"


def cache_bytes(sizes: Sizes, precision: Precision, *, batch: int, beam_size: int, source_tokens: int, target_tokens: int) -> int:
    """Bytes of keys and values, of all layers, that one worker's decoder step must read.

    Both caches are int8 in a bundle of int8, as its scales are constant here. Each row reads its own target's, of half of the
    target on the mean; each source's are read once for its beams.
    """
    per_token = 2 * sizes.decoder_layers * sizes.d_model * ELEMENT_BYTES[precision]
    self_cache = batch * beam_size * per_token * (target_tokens + 1) // 2
    cross_cache = batch * source_tokens * per_token
    return self_cache + cross_cache


def run(setting: Setting) -> Section:
    """Measure every cell of the model with random weights; see the module."""
    started = time.monotonic()
    if setting.device != "cpu":
        return Section(notes=("The bound is measured on CPUs only.",))
    model = all_models(setting.build, setting.trained)[BASE_RANDOM]
    found: list[Limit] = []
    unavailable: dict[str, str] = {}
    for precision in precisions(setting):
        try:
            text = text_for(model, setting)
            sizes = aside(sizes_of, model.marian())
            bundle = model.bundle(precision)
        except PeerUnavailableError as error:
            unavailable[f"onnxlate, {precision}"] = str(error)
            continue
        for shape in shapes(model, precision, setting):
            if is_left_out(precision, shape, setting):
                continue
            try:
                found.append(limit_of(model, bundle, precision, shape, text, sizes, setting))
                setting.say(f"{precision} {shape}: {found[-1]} of the bound")
            except PeerUnavailableError as error:
                unavailable[f"onnxlate, {precision}, {shape}"] = str(error)
    return Section.of(found, unavailable=unavailable, seconds=time.monotonic() - started)


def is_left_out(precision: Precision, shape: Shape, setting: Setting) -> bool:
    """Whether quick mode does without, unless it is asked for: to measure products anew around each cell takes long."""
    return setting.mode == "quick" and (
        (not setting.precisions and precision != "int8")
        or (not setting.batches and shape.one_at_a_time)
        or (not setting.beam_sizes and shape.beam_size > 1)
    )


def limit_of(
    model: BenchModel, bundle: Path, precision: Precision, shape: Shape, text: Text, sizes: Sizes, setting: Setting
) -> Limit:
    """One cell.

    Raises:
        PeerUnavailableError: onnxlate, or its products, do not run.
    """
    full = setting.mode == "full"
    workers = 1 if shape.one_at_a_time else setting.cores
    spec = PeerSpec(peer=peers.ONNXLATE, directory=bundle, precision=precision, split=Split(workers, 1))
    job = text.job(shape, sources_for(peers.ONNXLATE, shape, text, workers, full=full))
    with race.opened({peers.ONNXLATE: functools.partial(list, [spec])}) as runners:
        before = aside(time_products, sizes, precision, shape, workers)
        race_run = race.race(runners.lanes, race.same_for_all(job), race.FULL if full else race.QUICK)
        after = aside(time_products, sizes, precision, shape, workers)
    answers = [answer for some in race_run.answers.values() for answer in some]
    if not answers:
        raise PeerUnavailableError("; ".join([*runners.unavailable.values(), *race_run.lost.values()]))
    batches = len(job.sources) / (shape.batch * workers)
    return Limit(
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
        step_bytes=weight_bytes(step_products(sizes), precision) + _cache_bytes_of(shape, sizes, precision),
        bandwidth_bytes_per_s=max(before.bandwidth_bytes_per_s, after.bandwidth_bytes_per_s),
        measured_s=Measurement(tuple(answer.seconds / batches for answer in answers)),
    )


def _cache_bytes_of(shape: Shape, sizes: Sizes, precision: Precision) -> int:
    return cache_bytes(
        sizes,
        precision,
        batch=shape.batch,
        beam_size=shape.beam_size,
        source_tokens=SOURCE_TOKENS,
        target_tokens=TARGET_TOKENS,
    )


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
    del step
    bandwidth = read_bandwidth(
        threads=workers,
        shared_bytes=weight_bytes(step_products(sizes), precision),
        own_bytes=_cache_bytes_of(shape, sizes, precision),
    )
    return ProductTimes(encoder_s=encoder_s, step_s=step_s, bandwidth_bytes_per_s=bandwidth)


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
            number(limit.bandwidth_bytes_per_s / 1e9),
            number(limit.step_bytes * limit.workers / limit.bandwidth_bytes_per_s * 1e3),
            number(limit.bound_s * 1e3),
            number(limit.measured_s.median * 1e3),
            str(limit),
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
        "read at, GB/s",
        "reading takes, ms",
        "bound, ms a batch",
        "measured, ms a batch",
        "share reached",
    )
    explained = (
        f"{SOURCE_TOKENS} source and {TARGET_TOKENS} target tokens. The bound is of the runtime's own products: the longer of "
        "these and of reading weights and caches, for the encoder and for each step, at the speed at which so many bytes are "
        "read again and again. Too loose: more than all of it was reached, so that it says nothing."
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
