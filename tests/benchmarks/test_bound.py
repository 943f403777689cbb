from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks import bound
from benchmarks.bound import Limit
from benchmarks.products import (
    Product,
    ProductSession,
    Sizes,
    encoder_products,
    graph_of,
    read_bandwidth,
    step_products,
    weight_bytes,
    widths,
)
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
    products = [Product(4, 10), Product(8, 2)]
    assert weight_bytes(products, "int8") == 56 + 4 * 12
    assert weight_bytes(products, "fp32") == 224


def test_a_step_reads_weights_and_caches() -> None:
    read = bound.step_bytes(SIZES, "int8", batch=3, beam_size=2, source_tokens=5, target_tokens=7)
    # A token's key and value are 2 * 1 layer * 4 floats; a row's own target is half there on the mean.
    assert read == weight_bytes(step_products(SIZES), "int8") + 3 * 2 * 32 * 4 + 3 * 5 * 32


def test_the_bound_is_the_longer_of_products_and_reading_part_by_part() -> None:
    # The encoder: products, 0.5 s against 0.02. A step: reading, 2 workers * 2000 bytes = 0.04 s against 0.01.
    assert LIMIT.bound_s == pytest.approx(0.5 + 10 * 0.04)
    assert LIMIT.share == pytest.approx(0.9 / 1.8)


def test_the_page_shows_the_share() -> None:
    page = bound.render(Section.of([LIMIT]))
    assert "| 50% |" in page
    assert "0.0 GB/s" in page


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_graph_does_these_products_and_no_other(precision: Precision) -> None:
    products = step_products(SIZES)
    session = ort.InferenceSession(graph_of(products, precision), providers=["CPUExecutionProvider"])
    dtype = np.uint8 if precision == "int8" else np.float32
    made = session.run(None, {f"x{k}": np.full((3, k), 130, dtype) for k in widths(products)})
    assert [y.shape for y in made] == [(3, product.outputs) for product in products]
    assert all(np.any(y != 0) for y in made)


@pytest.mark.parametrize("threads", [1, 2])
def test_products_and_memory_take_time(threads: int) -> None:
    assert ProductSession(step_products(SIZES), "int8").seconds(2, threads=threads, repetitions=2) > 0
    assert read_bandwidth(threads=threads, buffer_bytes=2**16, repetitions=1) > 0
