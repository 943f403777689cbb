from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from benchmarks import bound, products
from benchmarks.bound import Limit
from benchmarks.experiment import Setting
from benchmarks.offline import Shape
from benchmarks.products import Product, ProductSession, Sizes, encoder_products, graph_of, step_products, weight_bytes, widths
from benchmarks.results import Measurement, Precision, Section

SIZES = Sizes(d_model=4, encoder_d_ff=16, decoder_d_ff=8, encoder_layers=2, decoder_layers=1, vocabulary=10)
LIMIT = Limit(
    model="base-random",
    precision="int8",
    batch=8,
    beam_size=1,
    workers=2,
    source_tokens=33,
    target_tokens=10,
    encoder_products_s=0.5,
    step_products_s=0.01,
    encoder_bytes=1000,
    step_bytes=2000,
    bandwidth_bytes_per_s=100_000.0,
    measured_s=Measurement((1.8, 2.0, 1.7)),
)


def test_products_of_the_encoder_end_with_the_cross_attention() -> None:
    layer = [Product(4, 12), Product(4, 4), Product(4, 16), Product(16, 4)]
    assert encoder_products(SIZES) == [*layer, *layer, Product(4, 8)]


def test_products_of_a_step_end_with_the_vocabulary() -> None:
    attention = [Product(4, 12), Product(4, 4), Product(4, 4), Product(4, 4)]
    assert step_products(SIZES) == [*attention, Product(4, 8), Product(8, 4), Product(4, 10)]


def test_weights_take_a_byte_and_a_scale_a_column_or_four_bytes() -> None:
    two = [Product(4, 10), Product(8, 2)]
    assert weight_bytes(two, "int8") == 56 + 4 * 12
    assert weight_bytes(two, "fp32") == 224


@pytest.mark.parametrize(("precision", "element_bytes"), [("int8", 1), ("fp32", 4)])
def test_a_step_reads_caches_in_the_bundles_precision(precision: Precision, element_bytes: int) -> None:
    read = bound.cache_bytes(SIZES, precision, batch=3, beam_size=2, source_tokens=5, target_tokens=7)
    # A token's key and value are 2 * 1 layer * 4 elements; a row's own target is half there on the mean.
    assert read == (3 * 2 * 4 + 3 * 5) * 8 * element_bytes


def test_the_bound_is_the_longer_of_products_and_reading_part_by_part() -> None:
    # The encoder: products, 0.5 s against 0.02. A step: reading, 2 workers * 2000 bytes = 0.04 s against 0.01.
    assert LIMIT.bound_s == pytest.approx(0.5 + 10 * 0.04)
    assert LIMIT.share == pytest.approx(0.9 / 1.8)


def test_the_page_shows_the_share() -> None:
    (row,) = [line for line in bound.render(Section.of([LIMIT])).splitlines() if line.startswith("| int8")]
    assert row.endswith("| 50% |")


def test_the_page_says_where_the_bound_is_too_loose() -> None:
    page = bound.render(Section.of([replace(LIMIT, measured_s=Measurement((0.8,)))]))
    assert "| 112%, too loose |" in page
    assert "of the runtime's own products" in page


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_graph_does_these_products_and_no_other(precision: Precision) -> None:
    wanted = step_products(SIZES)
    session = ort.InferenceSession(graph_of(wanted, precision), providers=["CPUExecutionProvider"])
    dtype = np.uint8 if precision == "int8" else np.float32
    made = session.run(None, {f"x{k}": np.full((3, k), 130, dtype) for k in widths(wanted)})
    assert [y.shape for y in made] == [(3, product.outputs) for product in wanted]
    assert all(np.any(y != 0) for y in made)


class FakeClock:
    """Moves when it is told to, and a little at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._lock = threading.Lock()

    def pass_s(self, seconds: float) -> None:
        with self._lock:
            self.now_s += seconds

    def perf_counter(self) -> float:
        with self._lock:
            return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock()
    monkeypatch.setattr(products, "time", made)
    return made


@pytest.mark.parametrize("threads", [1, 2])
def test_the_time_of_a_pass_leaves_the_first_one_out(clock: FakeClock, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    session = ProductSession(step_products(SIZES), "int8")
    rows = []

    class FakeSession:
        def run_with_iobinding(self, binding: ort.IOBinding) -> None:
            rows.append(binding.get_outputs()[0].shape()[0])
            # As of two threads of one CPU: nobody's time passes beside another's.
            clock.pass_s(3.0)

        def io_binding(self) -> ort.IOBinding:
            return real.io_binding()

    real = session._session
    monkeypatch.setattr(session, "_session", FakeSession())
    # Every thread's first pass comes before anybody's clock is read.
    assert session.seconds(2, threads=threads, repetitions=5) == pytest.approx(3.0 * threads)
    assert rows == [2] * threads * (1 + 5)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bandwidth_is_that_of_the_fastest_way_to_read_everything(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    read: list[int] = []

    def slow(words: npt.NDArray[np.uint64]) -> None:
        clock.pass_s(words.nbytes / 100)

    def fast(words: npt.NDArray[np.uint64]) -> None:
        read.append(words.nbytes)
        clock.pass_s(words.nbytes / 400)

    monkeypatch.setattr(products, "_READERS", (slow, fast))
    assert products.read_bandwidth(threads=threads, shared_bytes=800, own_bytes=80, repetitions=2) == pytest.approx(400)
    assert sorted(read) == [80] * threads * 3 + [800] * threads * 3


@pytest.mark.parametrize("read", products._READERS)
def test_every_way_to_read_looks_at_all_of_it(read: Callable[[npt.NDArray[np.uint64]], object]) -> None:
    words = np.ones(64, np.float32).view(np.uint64)
    changed = words.copy()
    changed[-1] = np.array([2.0, 4.0], np.float32).view(np.uint64)[0]
    assert read(words) != read(changed)


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        (Setting(), [("int8", 32, 1)]),
        (Setting(beam_sizes=(1, 4)), [("int8", 32, 1), ("int8", 32, 4)]),
        (Setting(batches=(1, 32), precisions=("fp32",)), [("fp32", 1, 1), ("fp32", 32, 1), ("int8", 1, 1), ("int8", 32, 1)]),
        (
            Setting(mode="full"),
            [(precision, batch, beam) for precision in ("fp32", "int8") for batch in (1, 32) for beam in (1, 4)],
        ),
    ],
    ids=["quick", "beams", "batches and precisions", "full"],
)
def test_quick_mode_leaves_out_what_it_is_not_asked_for(setting: Setting, left: list[tuple[Precision, int, int]]) -> None:
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    cells = [(precision, Shape(batch, beam)) for precision in precisions for batch in (1, 32) for beam in (1, 4)]
    found = [(p, shape.batch, shape.beam_size) for p, shape in cells if not bound.is_left_out(p, shape, setting)]
    assert found == left
