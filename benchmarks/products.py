"""The matrix products of a translation, alone: which they are, and small ONNX graphs of nothing else.

Knows shapes of the paper's Transformer, products of one input put together as far as they can be (query, key and value; keys and
values of all cross-attention layers), and how a product is written in each precision. Does not know what a translation takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.results import Precision

_OPSET = 21
_SEED = 0
# As ``export.quantize`` has it.
_ZERO_POINT = 128
# Of an element of the weights, and of the caches.
ELEMENT_BYTES = {"fp32": 4, "int8": 1}
# Read an array and keep nothing; which is the fastest depends on the CPU. BLAS is left out: it may use threads of its own.
_READERS: tuple[Callable[[npt.NDArray[np.uint64]], object], ...] = (
    lambda words: np.bitwise_or.reduce(words),
    lambda words: words.max(),
    lambda words: words.view(np.int8).max(),
    lambda words: words.view(np.float32).max(),
    lambda words: words.view(np.float64).sum(),
)
_WORD_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What decides the shapes."""

    d_model: int
    encoder_d_ff: int
    decoder_d_ff: int
    encoder_layers: int
    decoder_layers: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Product:
    """[rows, inputs] x [inputs, outputs]."""

    inputs: int
    outputs: int


def encoder_products(sizes: Sizes) -> list[Product]:
    """Of one pass over a source, the cross-attention's keys and values included."""
    d = sizes.d_model
    layer = [Product(d, 3 * d), Product(d, d), Product(d, sizes.encoder_d_ff), Product(sizes.encoder_d_ff, d)]
    return layer * sizes.encoder_layers + [Product(d, 2 * d * sizes.decoder_layers)]


def step_products(sizes: Sizes) -> list[Product]:
    """Of one decoder step."""
    d = sizes.d_model
    attention = [Product(d, 3 * d), Product(d, d), Product(d, d), Product(d, d)]
    layer = [*attention, Product(d, sizes.decoder_d_ff), Product(sizes.decoder_d_ff, d)]
    return layer * sizes.decoder_layers + [Product(d, sizes.vocabulary)]


def weight_bytes(products: Sequence[Product], precision: Precision) -> int:
    """What the weights take, with a float32 scale for each column in int8."""
    return sum(
        product.inputs * product.outputs * ELEMENT_BYTES[precision] + (4 * product.outputs if precision == "int8" else 0)
        for product in products
    )


def graph_of(products: Sequence[Product], precision: Precision) -> bytes:
    """A graph that does these products one after the other, each with weights of its own; its inputs are shared by width.

    Inputs are ``x{width}`` [rows, width], float32, or uint8 around 128 in int8; outputs ``y{i}`` [rows, outputs], float32.
    """
    generator = np.random.default_rng(_SEED)
    nodes, initializers, outputs = [], [], []
    if precision == "int8":
        initializers.append(numpy_helper.from_array(np.array(1, np.float32), "one"))
        initializers.append(numpy_helper.from_array(np.array(_ZERO_POINT, np.uint8), "zero_point"))
    for i, product in enumerate(products):
        shape = (product.inputs, product.outputs)
        x, w, y = f"x{product.inputs}", f"w{i}", f"y{i}"
        if precision == "int8":
            weight: npt.NDArray[np.generic] = generator.integers(-127, 128, shape, dtype=np.int8)
            initializers.append(numpy_helper.from_array(np.full(product.outputs, 1e-3, np.float32), f"s{i}"))
            named = [x, w, "one", f"s{i}", "zero_point"]
            nodes.append(helper.make_node("MatMulIntegerToFloat", named, [y], domain="com.microsoft"))
        else:
            weight = generator.standard_normal(shape, dtype=np.float32)
            nodes.append(helper.make_node("MatMul", [x, w], [y]))
        initializers.append(numpy_helper.from_array(weight, w))
        outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ["rows", product.outputs]))
    kind = TensorProto.UINT8 if precision == "int8" else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(f"x{k}", kind, ["rows", k]) for k in widths(products)]
    graph = helper.make_graph(nodes, "products", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def widths(products: Sequence[Product]) -> list[int]:
    """The inputs' widths, each once."""
    return list(dict.fromkeys(product.inputs for product in products))


class ProductSession:
    """A graph of products, loaded once for all threads; each call runs on its caller's thread."""

    def __init__(self, products: Sequence[Product], precision: Precision) -> None:
        self._products = list(products)
        self._dtype = np.uint8 if precision == "int8" else np.float32
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        graph = graph_of(self._products, precision)
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def seconds(self, rows: int, *, threads: int, repetitions: int) -> float:
        """Seconds of one pass, when ``threads`` threads make passes on ``rows`` rows each, all at the same time.

        Args:
            rows: of each thread.
            threads: at work.
            repetitions: passes of each thread, over which the time is averaged; a first one does not count.
        """
        bindings = [self._binding(rows) for _ in range(threads)]
        return _together(lambda number: self._session.run_with_iobinding(bindings[number]), threads, repetitions)

    def _binding(self, rows: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        for k in widths(self._products):
            values = np.full((rows, k), 130, self._dtype)
            binding.bind_ortvalue_input(f"x{k}", ort.OrtValue.ortvalue_from_numpy(values))
        for i, product in enumerate(self._products):
            buffer = np.zeros((rows, product.outputs), np.float32)
            binding.bind_ortvalue_output(f"y{i}", ort.OrtValue.ortvalue_from_numpy(buffer))
        return binding


def read_bandwidth(*, threads: int, shared_bytes: int, own_bytes: int, repetitions: int = 3) -> float:
    """Bytes a second that ``threads`` threads together read, again and again, from wherever so many bytes come to lie.

    As in decoder steps, all of them read the same weights, and each reads caches of its own. The best of several ways to read.

    Args:
        threads: at work, all at the same time.
        shared_bytes: that each of them reads.
        own_bytes: that each of them reads and no other.
        repetitions: passes over everything, in each way; a first one does not count.
    """
    shared = _words(shared_bytes)
    own = [_words(own_bytes) for _ in range(threads)]
    read_bytes = threads * shared.nbytes + sum(words.nbytes for words in own)

    def seconds(read: Callable[[npt.NDArray[np.uint64]], object]) -> float:
        def work(number: int) -> None:
            read(shared)
            read(own[number])

        return _together(work, threads, repetitions)

    return read_bytes / min(seconds(read) for read in _READERS)


def _words(count_bytes: int) -> npt.NDArray[np.uint64]:
    # Ordinary numbers in every view: sums of denormal ones are slow.
    return np.ones(2 * max(1, count_bytes // _WORD_BYTES), np.float32).view(np.uint64)


def _together(work: Callable[[int], None], threads: int, repetitions: int) -> float:
    """Seconds of one pass when threads, numbered from 0, make theirs all at the same time; a first one does not count."""
    # By their own clocks: by the time that somebody else looks, short passes are over.
    began, ended = [0.0] * threads, [0.0] * threads
    start = threading.Barrier(threads)

    def run(number: int) -> None:
        work(number)
        start.wait()
        began[number] = time.perf_counter()
        for _ in range(repetitions):
            work(number)
        ended[number] = time.perf_counter()

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return (max(ended) - min(began)) / repetitions
