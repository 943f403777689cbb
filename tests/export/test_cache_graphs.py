"""The graph that moves rows of the caches."""

import numpy as np
import onnx
import pytest

from export.cache_graphs import cache_rows_graph
from serving.session import load_graph


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_every_tensor_is_gathered_by_the_same_rows(precision: str, dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(0)
    sources = [rng.random((5, values)).astype(dtype) for values in (3, 7)]
    rows = np.array([4, 0, 0, 2, 1, 3, 4])
    feeds = {"rows": rows, "source.0": sources[0], "source.1": sources[1]}
    got = load_graph(cache_rows_graph(2, precision)).run(["target.0", "target.1"], feeds)
    for target, source in zip(got, sources, strict=True):
        assert target.dtype == dtype
        assert np.array_equal(target, source[rows])


def test_it_holds_no_other_operator() -> None:
    model = onnx.load_from_string(cache_rows_graph(12))
    assert [node.op_type for node in model.graph.node] == ["Gather"] * 12
    assert not model.graph.initializer
