"""The graph that moves rows of the caches."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export.cache_graphs import cache_rows_graph
from serving.runtime import load_graph


@pytest.mark.parametrize(
    ("element_type", "dtype"),
    [(TensorProto.FLOAT16, np.float16), (TensorProto.FLOAT, np.float32), (TensorProto.INT8, np.int8)],
    ids=["fp16", "fp32", "int8"],
)
def test_every_tensor_is_gathered_by_the_same_rows(element_type: TensorProto.DataType, dtype: type[np.number]) -> None:
    rng = np.random.default_rng(0)
    sources = [(100 * rng.random((5, values))).astype(dtype) for values in (3, 7)]
    rows = np.array([4, 0, 0, 2, 1, 3, 4])
    feeds = {"rows": rows, "source.0": sources[0], "source.1": sources[1]}
    got = load_graph(cache_rows_graph(2, element_type)).run(["target.0", "target.1"], feeds)
    for target, source in zip(got, sources, strict=True):
        assert target.dtype == dtype
        assert np.array_equal(target, source[rows])


def test_it_holds_no_other_operator() -> None:
    model = onnx.load_from_string(cache_rows_graph(12, TensorProto.FLOAT16))
    assert [node.op_type for node in model.graph.node] == ["Gather"] * 12
    assert not model.graph.initializer
