"""Which files a graph takes its weights from.

A graph may keep tensors in other files, which it names by a path: ONNX's external data. A bundle may come from anywhere, so that
before the runtime follows such a path it has to be the name of a file that the manifest lists, and that was checked as such.
Knows where in ONNX's messages a tensor may be; does not know what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

# The part of onnx.proto that leads to external data: message -> field -> its number and type. All else is skipped when a graph is
# read. Every field is repeated here, so that of one that is there several times no occurrence is lost.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"graph": (7, "Graph"), "training_info": (20, "Training"), "functions": (25, "Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"node": (7, "Node"), "attribute_proto": (11, "Attribute")},
    "Graph": {"node": (1, "Node"), "initializer": (5, "Tensor"), "sparse_initializer": (15, "SparseTensor")},
    "Node": {"attribute": (5, "Attribute")},
    "Attribute": {
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "tensors": (10, "Tensor"),
        "graphs": (11, "Graph"),
        "sparse_tensor": (22, "SparseTensor"),
        "sparse_tensors": (23, "SparseTensor"),
    },
    "SparseTensor": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"external_data": (13, "Entry")},
    "Entry": {"key": (1, "bytes"), "value": (2, "bytes")},
}
_PACKAGE = "onnxlate.external_data"


def external_data_faults(graph: Path, listed: Collection[str]) -> list[str]:
    """Every file that a graph takes tensors from and may not; empty when there is none.

    Args:
        graph: the file of an ONNX model.
        listed: names that the manifest lists; they are plain names of files beside the graph.
    """
    model = _model_class()()
    try:
        model.ParseFromString(graph.read_bytes())
    except (DecodeError, OSError) as error:
        return [f"{graph.name}: is no ONNX model: {error}"]
    locations = sorted({location for location in _locations(model) if location not in listed})
    return [
        f"{graph.name}: takes tensors from {location!r}, which is not among the bundle's files; nothing else is read"
        for location in locations
    ]


def _locations(message: Message) -> Iterator[str]:
    """What any external data in a message names as its place."""
    for field, values in message.ListFields():
        if field.name == "external_data":
            for entry in values:
                if b"location" in entry.key:
                    yield from (value.decode(errors="backslashreplace") for value in entry.value)
        else:
            for value in values:
                yield from _locations(value)


@cache
def _model_class() -> Any:
    """The class of a model's message, made of the table above."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            field = message.field.add(name=field_name, number=number, label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED)
            if kind == "bytes":
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
            else:
                field.type, field.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))
