"""How traced graphs become files, with their weights in one file beside them.

Knows ONNX's way to store a tensor elsewhere; does not know what a graph computes. A protobuf holds two gigabytes at most, and
whoever writes or reads one holds it in memory several times. So all weights of a bundle's graphs are in one file, each where a
page begins: they are written one after another, and ONNX Runtime maps them into memory instead of reading them. What several
graphs share, as two decoders do nearly everything, is there once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onnx import ModelProto, TensorProto
from torch import Tensor

from serving.errors import ExportError

WEIGHTS_NAME = "weights.data"
# A page, on every machine that serves; the format asks for it.
_ALIGNMENT_BYTES = 4096
# Of a weight, at a time.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class TracedGraph:
    """A graph, and its weights where the module that was traced has them."""

    # With the names, types and shapes of its weights, and without their values.
    model: ModelProto
    # By name; views of any strides.
    weights: dict[str, Tensor]


def write_graphs(directory: Path, graphs: Mapping[str, TracedGraph]) -> dict[str, Path]:
    """Write graphs and one file of their weights.

    Args:
        directory: is made.
        graphs: by the names of their files.

    Returns:
        The files by their names.

    Raises:
        ExportError: a file cannot be written.
    """
    try:
        directory.mkdir()
        with (directory / WEIGHTS_NAME).open("xb") as stream:
            written: dict[tuple[object, ...], int] = {}
            for name, graph in graphs.items():
                (directory / name).write_bytes(_beside_weights(graph, stream, written))
        return {name: directory / name for name in (*graphs, WEIGHTS_NAME)}
    except OSError as error:
        raise ExportError(f"the graphs could not be written: {error}") from error


def _beside_weights(graph: TracedGraph, stream: BinaryIO, written: dict[tuple[object, ...], int]) -> bytes:
    """The serialized graph, whose weights go to the stream.

    Args:
        graph: what to write.
        stream: the file of weights.
        written: memory, layout and type of each weight in the file -> where it begins.
    """
    model = ModelProto()
    model.CopyFrom(graph.model)
    for tensor in (tensor for tensor in model.graph.initializer if tensor.name in graph.weights):
        weight = graph.weights[tensor.name]
        memory = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        if memory not in written:
            stream.write(bytes(-stream.tell() % _ALIGNMENT_BYTES))
            written[memory] = stream.tell()
            for chunk in _chunks(weight):
                stream.write(chunk)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_NAME), ("offset", written[memory]), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
    return model.SerializeToString()


def _chunks(weight: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in the order of its elements."""
    rows = max(1, _CHUNK_VALUES * weight.shape[0] // max(1, weight.numel()))
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows].contiguous().numpy().tobytes()
