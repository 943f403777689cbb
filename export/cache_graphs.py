"""The graph with which serving moves rows of its caches on a device, where no array is at hand to do it.

Knows one operator, Gather, and how many tensors a cache has; does not know the model, or what a row is.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from export.onnx_export import OPSET

# Of the ONNX file format: what the opset came with, so that every runtime that knows the one reads the other.
_IR_VERSION = 8


def cache_rows_graph(num_tensors: int, element_type: TensorProto.DataType) -> bytes:
    """Build ``source.N`` [rows, values], ``rows`` [n] int64 -> ``target.N`` [n, values], target.N[i] = source.N[rows[i]].

    All tensors in one call; rows and values are free in each, so that a row may be a cache's row, a head or a position.

    Args:
        num_tensors: N goes from 0 to num_tensors - 1.
        element_type: of the caches.

    Returns:
        The serialized ONNX model.
    """
    numbers = range(num_tensors)
    graph = helper.make_graph(
        [helper.make_node("Gather", [f"source.{i}", "rows"], [f"target.{i}"], axis=0) for i in numbers],
        "cache_rows",
        [
            *(helper.make_tensor_value_info(f"source.{i}", element_type, [f"source_rows.{i}", f"values.{i}"]) for i in numbers),
            helper.make_tensor_value_info("rows", TensorProto.INT64, ["n"]),
        ],
        [helper.make_tensor_value_info(f"target.{i}", element_type, ["n", f"values.{i}"]) for i in numbers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()
